"""Calibration text, and sums over its batches: shared out over processes, kept as far as they have come."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from lp_train.data import RowCollator
from lp_train.data.rows import IGNORED
from lp_train.errors import UserError
from lp_train.evaluation.fidelity import evaluating
from lp_train.pairing import check_branches, check_family, decoder_of, is_paired
from lp_train.selection import store
from lp_train.selection.stack import Stack

GPU_TOKENS, CPU_TOKENS = 65_536, 2_048  # a sweep of 30 layers: seconds on a GPU, in float32 15 minutes on two CPU cores
PARTS = 4  # batches at least, as far as there are rows, so that a stopped measurement loses little

Measure = Callable[[Stack], Iterator[Tensor]]


def default_tokens(device: torch.device) -> int:
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


@dataclass
class Calibration:
    """An unpaired base on its calibration rows; ``batch_size``: rows at a time at most.

    Raises:
        UserError: a family that cannot be paired.
    """

    model: nn.Module
    rows: Dataset
    collate: RowCollator
    algebra: str
    state: PartialState
    batch_size: int = 8
    about: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        assert not is_paired(self.model)
        check_branches(self.model, check_family(self.model.config.model_type), range(self.num_layers))
        self.about = store.about(self.model, self.rows, self.algebra)
        self.batch_size = max(1, min(self.batch_size, len(self.rows) // PARTS))

    @property
    def num_layers(self) -> int:
        return len(decoder_of(self.model).layers)

    @property
    def tokens(self) -> int:
        """Predicted ones, which figures are means over."""
        return sum(label != IGNORED for row in self.rows["labels"] for label in row)

    @property
    def folder(self) -> Path:
        return store.folder_of(self.about)

    def batch(self, indices: range) -> dict[str, Tensor]:
        """As long as its longest row: on a CPU, few rows are not all full."""
        rows, where = [self.rows[i] for i in indices], next(self.model.parameters()).device
        collate = dataclasses.replace(self.collate, max_length=max(len(row["input_ids"]) for row in rows))
        return {name: tensor.to(where) for name, tensor in collate(rows).items()}

    def total(self, measure: Measure, pieces: int, name: str) -> Tensor:
        """The sum over all batches of what ``measure`` yields in ``pieces`` [n, columns], one below the other: float64
        [rows, columns] on the CPU, the same on every process.

        Batches are shared out over the processes. The sum is kept under ``name`` after each round of batches, so that
        a measurement that was stopped goes on and a finished one is read.

        Raises:
            UserError: NaN or infinite values in the original's layers or in the result.
        """
        file, last = self.folder / f"{name}.json", len(self.rows) - 1
        kept = [store.read(file, self.about) if self.state.is_main_process else None]
        broadcast_object_list(kept)  # the first process's disk decides, where each has its own
        done, total = (kept[0]["rows"], torch.tensor(kept[0]["sums"], dtype=torch.float64)) if kept[0] else (0, None)
        rounds = range(done, len(self.rows), self.batch_size * self.state.num_processes)
        hidden = not self.state.is_main_process
        with evaluating(self.model), tqdm(total=len(rounds) * pieces, desc=name, disable=hidden, leave=False) as bar:
            for start in rounds:
                first = start + self.state.process_index * self.batch_size
                batch = self.batch(range(min(first, last), min(first + self.batch_size, last + 1)))
                found = []
                for piece in measure(Stack(self.model, batch, self.algebra)):
                    found.append(piece)
                    bar.update()
                sums = torch.cat(found) * (first <= last)  # there may be fewer batches than processes
                sums = reduce(sums.to(self.state.device), "sum").cpu()
                total = sums if total is None else total + sums
                if not total.isfinite().all():
                    rule = "layers side by side give NaN or infinite values where the original does not"
                    raise UserError(f"{rule}; set model.dtype bfloat16 or float32")
                if self.state.is_main_process:
                    store.write(file, self.about, {"rows": start + rounds.step, "sums": total.tolist()})
        assert total is not None
        return total
