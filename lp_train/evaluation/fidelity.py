"""NLL, KL and top-1 agreement of a paired model against the same weights run in order, on the same tokens."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, reduce
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from lp_train.data.rows import IGNORED
from lp_train.distill.losses import Head, rows_per_chunk
from lp_train.distill.replay import run_original, run_suffix

Variant = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
FIRST_BUCKET, BUCKETS = 3, 16  # of positions: up to 15 tokens of context, then doubling


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
    cells: np.ndarray  # [domains, buckets, 4]: the same sums by the document's domain and by position in it

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


def by_position(figures: Mapping[str, Fidelity]) -> dict[str, Any]:
    """The figures of each model over how many tokens of the document come before the one that is predicted."""
    edges = [1, *(2 ** (i + FIRST_BUCKET) for i in range(1, BUCKETS)), None]
    spans = [{"from": low, "to": high - 1 if high else None} for low, high in itertools.pairwise(edges)]
    return {"unit": "tokens of context", "buckets": _sections(spans, {m: f.cells.sum(0) for m, f in figures.items()})}


def by_domain(figures: Mapping[str, Fidelity], domains: Sequence[str]) -> dict[str, Any]:
    """The figures of each model over the sources of the held-out text."""
    names = [{"domain": name} for name in domains]
    return {"domains": _sections(names, {m: f.cells.sum(1) for m, f in figures.items()})}


def _sections(heads: Sequence[dict[str, Any]], sums: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    sections = []
    for i, head in enumerate(heads):
        if tokens := next(iter(sums.values()))[i, 0]:
            means = {model: (of_model[i, 1:] / tokens).tolist() for model, of_model in sums.items()}
            models = {m: dict(zip(("nll", "kl", "top1_agreement"), mean, strict=True)) for m, mean in means.items()}
            sections.append({**head, "tokens": int(tokens), "models": models})
    return sections


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
    domains: int = 1,
) -> dict[str, Fidelity]:
    """Runs the original once and each variant from the first pair on; returns their figures and ``sequential``'s.

    The rows are shared out over ``world_size`` processes and every process gets the whole result. Train mode and
    random state of the model come back as they were.
    """
    was_training, where = model.training, next(model.parameters()).device
    model.eval()
    names = ("sequential", *variants)
    head, mine = Head.of(model), list(range(rank, len(rows), world_size))
    found: list[tuple[int, dict[str, list[float]]]] = []
    cells = {name: torch.zeros(domains * BUCKETS, 4, dtype=torch.float64, device=where) for name in names}
    starts = range(0, len(mine), batch_size)
    for start in tqdm(starts, desc="measuring", disable=rank > 0 or len(starts) < 4, leave=False):
        indices = mine[start : start + batch_size]
        batch = {name: tensor.to(where) for name, tensor in collate([rows[i] for i in indices]).items()}
        trained = batch["labels"][:, 1:] != IGNORED
        row_of = trained.nonzero()[:, 0]
        cell_of = _cells(batch)[trained]
        with autocast():
            figures = _figures(model, batch, trained, head, variants)
        for name, values in figures.items():
            cells[name].index_add_(0, cell_of, values)
        sums = {
            name: values.new_zeros(len(indices), 4).index_add_(0, row_of, values) for name, values in figures.items()
        }
        for row, index in enumerate(indices):
            found.append((index, {name: values[row].tolist() for name, values in sums.items()}))
    model.train(was_training)
    everything = sorted(gather_object(found), key=lambda item: item[0])
    return {
        name: _gathered([values[name] for _, values in everything], cells[name].view(domains, BUCKETS, 4))
        for name in names
    }


def _gathered(rows: list[list[float]], cells: Tensor) -> Fidelity:
    tokens, nll, kl, agreements = np.array(rows, dtype=np.float64).T
    return Fidelity(tokens, nll, kl, agreements, reduce(cells, "sum").cpu().numpy())


def _cells(batch: dict[str, Tensor]) -> Tensor:
    """[B, T - 1]: the place of each predicted token among domains x buckets."""
    context = batch["position_ids"][:, 1:].clamp(min=1)
    buckets = (context.double().log2().floor().long() - FIRST_BUCKET).clamp(0, BUCKETS - 1)
    return buckets + BUCKETS * batch["domain"][:, 1:].clamp(min=0) if "domain" in batch else buckets


def _figures(
    model: nn.Module, batch: dict[str, Tensor], trained: Tensor, head: Head, variants: Mapping[str, Variant]
) -> dict[str, Tensor]:
    """For the original and each variant: [N, 4] of 1, NLL, KL and agreement of each token that ``trained`` names."""
    recording = run_original(model, batch)
    assert recording.final is not None
    hidden = {"sequential": recording.final}
    for name, variant in variants.items():
        with variant(model):
            hidden[name], _ = run_suffix(model, recording)
    labels = batch["labels"][:, 1:][trained]
    flat = {name: states[:, :-1][trained] for name, states in hidden.items()}
    figures = {name: torch.empty(len(labels), 4, dtype=torch.float64, device=labels.device) for name in hidden}
    rows = rows_per_chunk(labels.device)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        original = F.log_softmax(head.logits(flat["sequential"][part]), -1)
        for name, states in flat.items():
            ours = original if name == "sequential" else F.log_softmax(head.logits(states[part]), -1)
            figures[name][part] = _token_figures(original, ours, labels[part])
    return figures


def _token_figures(original: Tensor, ours: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities [N, V] twice and labels [N] -> [N, 4]: 1, NLL, KL(original || ours), same most likely token."""
    nll = -ours.gather(1, labels[:, None])[:, 0]
    kl = (original.exp() * (original - ours)).sum(-1)
    agree = ours.argmax(-1) == original.argmax(-1)
    return torch.stack([torch.ones_like(nll), nll, kl, agree.to(nll.dtype)], 1).double()
