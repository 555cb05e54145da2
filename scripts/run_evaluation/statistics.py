"""Paired statistics: two models on the same items, so that what makes an item hard for both cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from lp_train.evaluation.fidelity import standard_error

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items, in units of the metric: standard error of the difference over the items, and its
    95 % bootstrap interval. ``p_value``: McNemar's exact test, for right-or-wrong items and one seed. ``chance``: what
    guessing scores; None for a metric where lower is better, of which no share is retained."""

    original: float
    other: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float | None
    chance: float | None
    items: int
    seeds: int

    @property
    def difference(self) -> float:
        return self.other - self.original

    @property
    def differs(self) -> bool:
        """The interval leaves zero out and p < 0.05; otherwise the difference is inside its error."""
        inside = self.items < 2 or self.interval[0] <= 0 <= self.interval[1]
        return not inside and (self.p_value is None or self.p_value < 1 - LEVEL)

    @property
    def retained(self) -> float | None:
        """other / original in per cent."""
        return None if self.chance is None else retained(self.original, self.other)

    @property
    def retained_above_chance(self) -> float | None:
        return None if self.chance is None else retained(self.original, self.other, self.chance)

    def as_dict(self) -> dict[str, Any]:
        derived = ("difference", "differs", "retained", "retained_above_chance")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def compare(
    original: np.ndarray,
    other: np.ndarray,
    weights: np.ndarray | None = None,
    chance: float | None = 0.0,
    seed: int = 0,
) -> Comparison:
    """Means of ``original`` [N] and ``other`` [N], or [S, N] for S seeds of one recipe, over the same items.

    With ``weights`` [N] (an item's words) a figure is sum(values) / sum(weights). Variance of the difference: that over
    items, of the mean over seeds, plus that of the seeds' means over S; with one seed it is the items' alone, and seeds
    stay unmeasured.

    Raises:
        ValueError: no item, or different numbers of items.
    """
    other = np.atleast_2d(np.asarray(other, dtype=np.float64))
    original = np.asarray(original, dtype=np.float64)
    weights = np.ones(len(original)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not original.size or other.shape[1:] != original.shape or weights.shape != original.shape:
        raise ValueError(f"items of original {original.shape}, other {other.shape}, weights {weights.shape} differ")
    after = other.sum(1) / weights.sum()
    over_seeds = float(stats.sem(after)) if len(other) > 1 else 0.0
    binary = np.isin(original, (0, 1)).all() and np.isin(other, (0, 1)).all()
    return Comparison(
        original=float(original.sum() / weights.sum()),
        other=float(after.mean()),
        standard_error=math.hypot(standard_error(other.mean(0) - original, weights), over_seeds),
        interval=_bootstrap(original, other, weights, seed),
        p_value=mcnemar(original, other[0]) if len(other) == 1 and binary else None,
        chance=chance,
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
    members = [comparisons[task] for task in shares]
    original, other = (
        sum(s * getattr(comparisons[t], side) for t, s in shares.items()) for side in ("original", "other")
    )
    error = math.hypot(*(share * comparisons[task].standard_error for task, share in shares.items()))
    ends = (other - original - 1.96 * error, other - original + 1.96 * error)
    chance = sum(share * chances[task] for task, share in shares.items())
    items, seeds = sum(c.items for c in members), max(c.seeds for c in members)
    return Comparison(original, other, error, ends, None, chance, items, seeds)
