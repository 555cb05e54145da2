"""How far the residual stream of a paired model is from the original's, after each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from lp_train.distill.replay import run_original, run_suffix
from lp_train.evaluation.fidelity import Variant
from lp_train.pairing import plan_of


@torch.no_grad()
def drift(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    variants: Mapping[str, Variant],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, list[float]]:
    """``{variant: [of each pair, |h - h_original| / |h_original| of the stream after it]}``, the mean over tokens that
    are followed by a measured one. Every process gives its own batches and gets the mean over all of them."""
    was_training = model.training
    model.eval()
    pairs, where = plan_of(model)[0].pairs, next(model.parameters()).device
    sums = {name: torch.zeros(len(pairs), 2, dtype=torch.float64, device=where) for name in variants}
    for batch in batches:
        with autocast():
            recording = run_original(model, batch, keep_pair_outputs=True)
            for name, variant in variants.items():
                with variant(model):
                    _, outputs = run_suffix(model, recording)
                errors = [_errors(outputs[i], recording.pair_outputs[i], batch["trained"]) for i in sorted(outputs)]
                for sum_and_count, error in zip(sums[name], errors, strict=True):
                    sum_and_count += torch.stack([error.sum(), error.new_tensor(len(error))])
    model.train(was_training)
    return {name: (total[:, 0] / total[:, 1]).tolist() for name, total in reduce(sums, "sum").items()}


def _errors(ours: Tensor, original: Tensor, tokens: Tensor) -> Tensor:
    """[B, T, D] twice, and which tokens -> [N] float64."""
    ours, original = (states.flatten(0, 1)[tokens].double() for states in (ours, original))
    return (ours - original).norm(dim=-1) / original.norm(dim=-1)
