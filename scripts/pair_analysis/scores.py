"""Cheap scores of neighbouring layers, from the original alone: which pairs would cost much, without running any.

Means over the predicted tokens, of each pair (k, k+1); x, y, z: the stream before k, after k and after k+1, and L the
layer k+1 with its residual. The larger, the more the pair should cost.

    reaction   |(z - y) - (L(x) - x)| / |z - y|     how much layer k+1's update changes when it does not see layer k's
    error      |(z - y) - (L(x) - x)| / |z|         the same against the stream: the error a pair makes in it, were the
                                                    layers whole (not attention by attention)
    cosine     1 - cos(x, z)                        how far the pair turns the stream
    first      1 - cos(x, y)                        block influence of layer k (ShortGPT, arXiv 2403.03853)
    second     1 - cos(y, z)                        and of layer k+1
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from lp_train.selection.calibration import Calibration
from lp_train.selection.stack import Stack
from pair_analysis.sweep import Sweep

NAMES = ("reaction", "error", "cosine", "first", "second")


def scores(calibration: Calibration) -> dict[str, list[float]]:
    """Of each pair by its first layer, [num_layers - 1]; two passes of the original in all."""
    sums = calibration.total(_of_pairs, calibration.num_layers - 1, "scores")
    return dict(zip(NAMES, (sums / calibration.tokens).T.tolist(), strict=True))


def _of_pairs(stack: Stack) -> Iterator[Tensor]:
    for k in range(stack.num_layers - 1):
        without = stack.layer(k + 1, stack.states[k])
        x, y, z, alone = (state.flatten(0, 1)[stack.trained].float() for state in (*stack.states[k : k + 3], without))
        change = ((z - y) - (alone - x)).norm(dim=-1)
        tiny = torch.finfo(torch.float32).tiny  # a layer may add nothing
        found = [change / (z - y).norm(dim=-1).clamp(min=tiny), change / z.norm(dim=-1).clamp(min=tiny)]
        found += [1 - F.cosine_similarity(one, other, dim=-1) for one, other in ((x, z), (x, y), (y, z))]
        yield torch.stack(found).double().sum(1)[None]


def rank_correlations(found: dict[str, list[float]], swept: Sweep) -> dict[str, float]:
    """Spearman's, of each score with the KL that the sweep found for the single pairs."""
    costs = pd.Series([swept.costs[k, 1].kl for k in range(swept.num_layers - 1)]).rank()
    return {name: float(pd.Series(values).rank().corr(costs)) for name, values in found.items()}
