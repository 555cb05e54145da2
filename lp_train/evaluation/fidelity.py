"""NLL, KL and top-1 agreement of a paired model against the same weights run in order, on the same tokens."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from lp_train.cluster.preemption import stop_if_asked
from lp_train.cluster.shard import inside
from lp_train.distill.losses import Head, rows_per_chunk
from lp_train.distill.replay import run_original, run_suffix
from lp_train.pairing import plan_of
from lp_train.pairing.heal import relative_errors

Variant = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
FIRST_BUCKET, BUCKETS = 3, 16  # of positions: up to 15 tokens of context, then doubling


def as_it_is(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The variant that leaves the model as it is switched: pairs side by side, adapters on."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode and no gradients. Afterwards the random state is as before, and each module's mode."""
    modes, where = [(module, module.training) for module in model.modules()], next(model.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng([where] if where.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def shared_out(count: int, size: int, rank: int, world_size: int) -> Iterator[tuple[range, bool]]:
    """This process's batches of ``count`` items, ``size`` in each, and whether a batch counts.

    All processes get as many, where there are no more one for nothing: sharded weights need every process in every
    forward. The batches are those of a single process, so that results are too."""
    starts = range(0, count, size)
    for i in range(rank, -(-len(starts) // world_size) * world_size, world_size):
        start = starts[i % len(starts)]
        yield range(start, min(start + size, count)), i < len(starts)


@dataclass(frozen=True)
class Fidelity:
    """Sums per held-out row, arrays of shape [rows]; natural logarithms. KL is KL(original || this), summed over
    the vocabulary at every position that has a label."""

    tokens: np.ndarray
    nll_sums: np.ndarray
    kl_sums: np.ndarray
    agreements: np.ndarray
    cells: np.ndarray  # [domains, buckets, 4]: the same sums by the document's domain and by position in it
    drift: np.ndarray  # [pairs]: |h - h_original| / |h_original| of the stream after each, mean over those tokens

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
    return {"buckets": _sections(spans, {m: f.cells.sum(0) for m, f in figures.items()})}


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


def measure(
    model: nn.Module,
    rows: Dataset | Sequence[Any],
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
    random state come back as they were. The device is not waited for between batches.
    """
    names, where, pairs = ("sequential", *variants), next(model.parameters()).device, len(plan_of(model)[0].pairs)
    shapes = ((len(rows), 4), (domains * BUCKETS, 4), (pairs,))
    sums = {name: [torch.zeros(s, dtype=torch.float64, device=where) for s in shapes] for name in names}
    batches = list(shared_out(len(rows), batch_size, rank, world_size))
    with evaluating(model):
        for indices, counts in tqdm(batches, desc="measuring", disable=rank > 0 or len(batches) < 4, leave=False):
            stop_if_asked()
            batch = {name: tensor.to(where) for name, tensor in collate([rows[i] for i in indices]).items()}
            row_of = batch["trained"] // batch["labels"].shape[1] + indices.start
            with autocast():
                figures, drifts = inside(model, _figures, model, batch, variants)
            for name in names if counts else ():
                of_rows, of_cells, of_pairs = sums[name]
                of_rows.index_add_(0, row_of, figures[name])
                of_cells.index_add_(0, _cells(batch), figures[name])
                of_pairs += drifts[name]
    return {name: _gathered(*reduce(of_model, "sum")) for name, of_model in sums.items()}


def _gathered(rows: Tensor, cells: Tensor, drifts: Tensor) -> Fidelity:
    tokens, nll, kl, agreements = rows.T.cpu().numpy()
    by_domain = cells.view(-1, BUCKETS, 4).cpu().numpy()
    return Fidelity(tokens, nll, kl, agreements, by_domain, drifts.cpu().numpy() / max(tokens.sum(), 1))


def _cells(batch: dict[str, Tensor]) -> Tensor:
    """[N]: the place of each predicted token among domains x buckets."""
    predicted = batch["trained"] + 1
    context = batch["position_ids"].flatten()[predicted].clamp(min=1)
    buckets = (context.double().log2().floor().long() - FIRST_BUCKET).clamp(0, BUCKETS - 1)
    return buckets + BUCKETS * batch["domain"].flatten()[predicted].clamp(min=0) if "domain" in batch else buckets


def _figures(
    model: nn.Module, batch: dict[str, Tensor], variants: Mapping[str, Variant]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the original and each variant [N, 4]: 1, NLL, KL and agreement of each of the batch's N predicted tokens; and
    [pairs]: the relative error of the stream after each, summed over the tokens that predict them."""
    recording, head, trained = run_original(model, batch, keep_pair_outputs=True), Head.of(model), batch["trained"]
    originals = [states.flatten(0, 1)[trained] for _, states in sorted(recording.pair_outputs.items())]
    hidden = {"sequential": recording.final.flatten(0, 1)[trained]}
    drifts = {"sequential": torch.zeros(len(originals), device=trained.device)}
    for name, variant in variants.items():
        with variant(model):
            final, outputs = run_suffix(model, recording)
        hidden[name] = final.flatten(0, 1)[trained]
        ours = [states.flatten(0, 1)[trained] for _, states in sorted(outputs.items())]
        drifts[name] = torch.stack([relative_errors(*pair).sum() for pair in zip(ours, originals, strict=True)])
    labels = batch["labels"].flatten()[trained + 1]
    figures = {name: torch.empty(len(labels), 4, dtype=torch.float64, device=labels.device) for name in hidden}
    rows = rows_per_chunk(labels.device)
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        original = F.log_softmax(head.logits(hidden["sequential"][chunk]), -1)
        for name, states in hidden.items():
            this = original if name == "sequential" else F.log_softmax(head.logits(states[chunk]), -1)
            figures[name][chunk] = _token_figures(original, this, labels[chunk])
    return figures, drifts


def _token_figures(original: Tensor, ours: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities [N, V] twice and labels [N] -> [N, 4]: 1, NLL, KL(original || ours), same most likely token."""
    nll = -ours.gather(1, labels[:, None])[:, 0]
    kl = (original.exp() * (original - ours)).sum(-1)
    agree = ours.argmax(-1) == original.argmax(-1)
    return torch.stack([torch.ones_like(nll), nll, kl, agree.to(nll.dtype)], 1).double()
