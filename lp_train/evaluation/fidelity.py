"""NLL, KL and top-1 agreement of a paired model against the same weights run in order, on the same tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from lp_train.data.rows import IGNORED
from lp_train.distill.losses import Head, rows_per_chunk
from lp_train.distill.replay import run_original, run_suffix

Variant = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


def as_it_is(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The variant that leaves the model as it is switched: pairs side by side, adapters on."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Fidelity:
    """Sums per held-out row, arrays of shape [rows]; natural logarithms. KL is KL(original || this), summed over
    the vocabulary at every position that has a label."""

    tokens: np.ndarray
    nll_sums: np.ndarray
    kl_sums: np.ndarray
    agreements: np.ndarray

    @property
    def nll(self) -> float:
        """Nats per token."""
        return float(self.nll_sums.sum() / self.tokens.sum())

    @property
    def kl(self) -> float:
        """Nats per token."""
        return float(self.kl_sums.sum() / self.tokens.sum())

    def as_dict(self) -> dict[str, float]:
        agreement = float(self.agreements.sum() / self.tokens.sum())
        return {"nll": self.nll, "ppl": math.exp(min(self.nll, 700)), "kl": self.kl, "top1_agreement": agreement}


def standard_error(sums: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of sums.sum() / tokens.sum() with rows as the independent units (ratio estimator)."""
    rows, ratio = len(sums), sums.sum() / tokens.sum()
    if rows < 2:
        return math.inf
    return float(np.sqrt(((sums - ratio * tokens) ** 2).sum() * rows / (rows - 1)) / tokens.sum())


@torch.no_grad()
def measure(
    model: nn.Module,
    rows: Dataset,
    collate: Callable[[Sequence[Any]], dict[str, Tensor]],
    batch_size: int,
    variants: Mapping[str, Variant],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Fidelity]:
    """Runs the original once and each variant from the first pair on; returns their figures and ``sequential``'s.

    The rows are shared out over ``world_size`` processes and every process gets the whole result. Train mode and
    random state of the model come back as they were.
    """
    was_training, where = model.training, next(model.parameters()).device
    model.eval()
    head, mine = Head.of(model), list(range(rank, len(rows), world_size))
    found: list[tuple[int, dict[str, list[float]]]] = []
    starts = range(0, len(mine), batch_size)
    for start in tqdm(starts, desc="measuring", disable=rank > 0 or len(starts) < 4, leave=False):
        indices = mine[start : start + batch_size]
        batch = {name: tensor.to(where) for name, tensor in collate([rows[i] for i in indices]).items()}
        with autocast():
            sums = _batch_sums(model, batch, head, variants)
        for row, index in enumerate(indices):
            found.append((index, {name: values[row].tolist() for name, values in sums.items()}))
    model.train(was_training)
    everything = sorted(gather_object(found), key=lambda item: item[0])
    return {name: _stack([values[name] for _, values in everything]) for name in ("sequential", *variants)}


def _stack(rows: list[list[float]]) -> Fidelity:
    return Fidelity(*np.array(rows, dtype=np.float64).T)


def _batch_sums(
    model: nn.Module, batch: dict[str, Tensor], head: Head, variants: Mapping[str, Variant]
) -> dict[str, Tensor]:
    """For the original and each variant: [B, 4] of tokens, NLL, KL and agreements, summed over each row."""
    recording = run_original(model, batch)
    assert recording.final is not None
    hidden = {"sequential": recording.final}
    for name, variant in variants.items():
        with variant(model):
            hidden[name], _ = run_suffix(model, recording)
    trained = batch["labels"][:, 1:] != IGNORED
    row_of = trained.nonzero()[:, 0]
    labels = batch["labels"][:, 1:][trained]
    flat = {name: states[:, :-1][trained] for name, states in hidden.items()}
    sums = {name: torch.zeros(len(trained), 4, dtype=torch.float64, device=labels.device) for name in hidden}
    rows = rows_per_chunk(labels.device)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        original = F.log_softmax(head.logits(flat["sequential"][part]), -1)
        for name, states in flat.items():
            ours = original if name == "sequential" else F.log_softmax(head.logits(states[part]), -1)
            sums[name].index_add_(0, row_of[part], _token_figures(original, ours, labels[part]))
    return sums


def _token_figures(original: Tensor, ours: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities [N, V] twice and labels [N] -> [N, 4]: 1, NLL, KL(original || ours), same most likely token."""
    nll = -ours.gather(1, labels[:, None])[:, 0]
    kl = (original.exp() * (original - ours)).sum(-1)
    agree = ours.argmax(-1) == original.argmax(-1)
    return torch.stack([torch.ones_like(nll), nll, kl, agree.to(nll.dtype)], 1).double()
