"""Paired statistics: two models on the same items, so that what makes an item hard for both cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from lp_train.evaluation.fidelity import standard_error

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """``other - original`` in units of the metric, its standard error and 95 % bootstrap interval over the items.

    ``p_value``: McNemar's exact test, for right-or-wrong items and one seed. ``retained``: other / original in per
    cent, ``retained_above_chance`` the same with what guessing scores taken off both; None where that means nothing.
    ``differs``: the interval leaves zero out and p < 0.05; otherwise the difference is inside its error.
    """

    original: float
    other: float
    difference: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float | None
    retained: float | None
    retained_above_chance: float | None
    differs: bool
    items: int
    seeds: int


def compare(
    original: np.ndarray,
    other: np.ndarray,
    weights: np.ndarray | None = None,
    chance: float | None = 0.0,
    seed: int = 0,
) -> Comparison:
    """Means of ``original`` [N] and ``other`` [N], or [S, N] for S seeds of one recipe, over the same items.

    With ``weights`` [N] (an item's words) a figure is sum(values) / sum(weights). ``chance`` None: a metric where
    lower is better, so that no share of it is retained. Variance of the difference: that over items, of the mean over
    seeds, plus that of the seeds' means over S; with one seed it is the items' alone, and seeds stay unmeasured.

    Raises:
        ValueError: no item, or different numbers of items.
    """
    other = np.atleast_2d(np.asarray(other, dtype=np.float64))
    original = np.asarray(original, dtype=np.float64)
    weights = np.ones(len(original)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not original.size or other.shape[1:] != original.shape or weights.shape != original.shape:
        raise ValueError(f"items of original {original.shape}, other {other.shape}, weights {weights.shape} differ")
    before, after = original.sum() / weights.sum(), other.sum(1) / weights.sum()
    over_seeds = float(stats.sem(after)) if len(other) > 1 else 0.0
    error = math.hypot(standard_error(other.mean(0) - original, weights), over_seeds)
    low, high = _bootstrap(original, other, weights, seed)
    binary = np.isin(original, (0, 1)).all() and np.isin(other, (0, 1)).all()
    p_value = mcnemar(original, other[0]) if len(other) == 1 and binary else None
    return Comparison(
        original=float(before),
        other=float(after.mean()),
        difference=float(after.mean() - before),
        standard_error=error,
        interval=(low, high),
        p_value=p_value,
        retained=None if chance is None else retained(before, after.mean()),
        retained_above_chance=None if chance is None else retained(before, after.mean(), chance),
        differs=original.size > 1 and (low > 0 or high < 0) and (p_value is None or p_value < 1 - LEVEL),
        items=original.size,
        seeds=len(other),
    )


def _bootstrap(original: np.ndarray, other: np.ndarray, weights: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile interval of the difference; items, and with several also seeds, are drawn with replacement.

    Items that are equal in everything are drawn as one with their count (multinomial): fast for accuracies.
    """
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(np.stack([original, weights, *other]), axis=1, return_counts=True)
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES).astype(np.float64)
    sums = drawn @ kinds.T  # [RESAMPLES, 2 + S]
    seeds = rng.integers(len(other), size=(RESAMPLES, len(other)))
    after = np.take_along_axis(sums[:, 2:], seeds, axis=1).mean(1)
    low, high = np.quantile((after - sums[:, 0]) / sums[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(original: np.ndarray, other: np.ndarray) -> float:
    """Two-sided exact p-value of right-or-wrong items [N]: of those on which the two models differ, as many are won
    as lost (McNemar 1947, with the binomial distribution in place of chi-squared)."""
    won, lost = int((other > original).sum()), int((other < original).sum())
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def retained(original: float, other: float, chance: float = 0.0) -> float | None:
    """(other - chance) / (original - chance) in per cent; None where the original is no better than chance."""
    return float(100 * (other - chance) / (original - chance)) if original > chance else None


def mean_of(
    comparisons: Mapping[str, Comparison], shares: Mapping[str, float], chances: Mapping[str, float]
) -> Comparison:
    """A group's weighted mean over tasks, whose items are different ones: errors add in squares, the interval is
    that of a normal distribution. ``shares`` add up to 1."""
    mean = {
        name: sum(share * getattr(comparisons[task], name) for task, share in shares.items())
        for name in ("original", "other", "difference")
    }
    error = math.sqrt(sum((share * comparisons[task].standard_error) ** 2 for task, share in shares.items()))
    chance = sum(share * chances[task] for task, share in shares.items())
    interval = (mean["difference"] - 1.96 * error, mean["difference"] + 1.96 * error)
    return Comparison(
        **mean,
        standard_error=error,
        interval=interval,
        p_value=None,
        retained=retained(mean["original"], mean["other"]),
        retained_above_chance=retained(mean["original"], mean["other"], chance),
        differs=interval[0] > 0 or interval[1] < 0,
        items=sum(comparisons[task].items for task in shares),
        seeds=max(comparisons[task].seeds for task in shares),
    )
