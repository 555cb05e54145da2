"""Calibration text, and sums over its batches: shared out over processes, kept batch by batch."""

from __future__ import annotations

import dataclasses
import shutil
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
from lp_train.pairing import is_paired
from lp_train.pairing.families import check_branches, check_family, decoder_of
from lp_train.selection import store
from lp_train.selection.stack import Stack

GPU_TOKENS, CPU_TOKENS = 65_536, 2_048  # a sweep of 30 layers: seconds on a GPU, some minutes on two CPU cores
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

    def kept(self, name: str) -> dict[str, Any] | None:
        """What :meth:`keep` wrote under this name, of the first process's disk, on every process."""
        found = [store.read(self.folder / f"{name}.json", self.about) if self.state.is_main_process else None]
        broadcast_object_list(found)
        return found[0]

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Called by every process; the first one writes."""
        if self.state.is_main_process:
            store.write(self.folder / f"{name}.json", self.about, content)

    def batches(self) -> list[range]:
        starts = range(0, len(self.rows), self.batch_size)
        return [range(start, min(start + self.batch_size, len(self.rows))) for start in starts]

    def batch(self, indices: range) -> dict[str, Tensor]:
        """As long as its longest row: on a CPU, few rows are not all full."""
        rows, where = [self.rows[i] for i in indices], next(self.model.parameters()).device
        collate = dataclasses.replace(self.collate, max_length=max(len(row["input_ids"]) for row in rows))
        return {name: tensor.to(where) for name, tensor in collate(rows).items()}

    def total(self, measure: Measure, steps: int, name: str, keep: bool = False) -> Tensor:
        """The sum over all batches of what ``measure`` yields in ``steps`` pieces [n, columns], one below the other:
        float64 [rows, columns] on the CPU, the same on every process.

        ``keep``: the result is kept, and until then each batch: what was measured before is read, and a measurement
        that was stopped goes on.

        Raises:
            UserError: NaN or infinite values in the original's layers or in the result.
        """
        if keep and (content := self.kept(name)):
            return torch.tensor(content["sums"], dtype=torch.float64)
        parts = self.folder / f"{name}.parts"
        done = {span: found for span in self.batches() if keep and (found := self._part_of(parts, span)) is not None}
        kept = [sorted(done, key=lambda span: span.start)]
        broadcast_object_list(kept)  # the first process's disk decides, where each has its own
        todo = [span for span in self.batches() if span not in kept[0]]
        mine = todo[self.state.process_index :: self.state.num_processes]
        sums = [done[span] for span in kept[0]] if self.state.is_main_process else []
        hidden = not self.state.is_main_process
        with evaluating(self.model), tqdm(total=len(mine) * steps, desc=name, disable=hidden, leave=False) as bar:
            for span in mine:
                pieces = []
                for piece in measure(Stack(self.model, self.batch(span), self.algebra)):
                    pieces.append(piece)
                    bar.update()
                sums.append(torch.cat(pieces).cpu())
                if keep:
                    store.write(self._part(parts, span), self.about, {"sums": sums[-1].tolist()})
        total = self._gathered(sums)
        if keep:
            self.keep(name, {"sums": total.tolist()})
            shutil.rmtree(parts, ignore_errors=True)
        return total

    def _part(self, parts: Path, span: range) -> Path:
        return parts / f"rows-{span.start:05d}-{span.stop:05d}.json"

    def _part_of(self, parts: Path, span: range) -> Tensor | None:
        content = store.read(self._part(parts, span), self.about)
        return None if content is None else torch.tensor(content["sums"], dtype=torch.float64)

    def _gathered(self, sums: list[Tensor]) -> Tensor:
        """Over the processes, of which one may have had no batch."""
        shape = [[*sums[0].shape] if sums else []]
        broadcast_object_list(shape)  # the first process has the first batch
        mine = torch.stack(sums).sum(0) if sums else torch.zeros(shape[0], dtype=torch.float64)
        total = reduce(mine.to(self.state.device), "sum").cpu()
        if not total.isfinite().all():
            raise UserError(
                "layers side by side give NaN or infinite values where the original does not; set model.dtype bfloat16 "
                "or float32"
            )
        return total
