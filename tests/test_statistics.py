"""Paired statistics against formulas, SciPy, and cases whose answer is known."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from run_evaluation.statistics import compare, mcnemar, mean_of, retained

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=200)


def pairs(values: list[tuple[bool, bool]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(values, dtype=float)
    return array[:, 0], array[:, 1]


@given(answers)
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(values: list[tuple[bool, bool]]) -> None:
    original, other = pairs(values)
    won, lost = int((other > original).sum()), int((other < original).sum())
    expected = scipy.stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(original, other) == pytest.approx(expected, rel=1e-9)


@given(answers)
@settings(max_examples=60, deadline=None)
def test_difference_and_error_are_those_of_the_paired_differences(values: list[tuple[bool, bool]]) -> None:
    original, other = pairs(values)
    found, d = compare(original, other), other - original
    assert found.difference == pytest.approx(d.mean(), abs=1e-12)
    assert found.standard_error == pytest.approx(scipy.stats.sem(d), abs=1e-12)
    assert found.interval[0] - 1e-12 <= found.difference <= found.interval[1] + 1e-12
    assert found.p_value == mcnemar(original, other)


@pytest.mark.parametrize(("won", "lost", "p"), [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 5, 2 / 32)])
def test_mcnemar_by_hand(won: int, lost: int, p: float) -> None:
    original = np.r_[np.zeros(won), np.ones(lost), np.zeros(20), np.ones(30)]
    other = np.r_[np.ones(won), np.zeros(lost), np.zeros(20), np.ones(30)]
    assert mcnemar(original, other) == pytest.approx(p, rel=1e-12)


def test_many_items_do_not_overflow() -> None:
    original = np.tile([0.0, 1.0, 1.0], 30_000)
    other = np.tile([1.0, 0.0, 1.0], 30_000)
    assert mcnemar(original, other) == pytest.approx(1.0)
    assert mcnemar(original, np.zeros(90_000)) < 1e-100


def plain_interval(original: np.ndarray, seeds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Items and seeds drawn with replacement, one draw after the other."""
    rng, (number, items), drawn = np.random.default_rng(1), seeds.shape, []
    for _ in range(4000):
        i, s = rng.integers(items, size=items), rng.integers(number, size=number)
        drawn.append((seeds[s][:, i].mean(0) - original[i]).sum() / weights[i].sum())
    return np.quantile(drawn, [0.025, 0.975])


def test_interval_is_that_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(1)
    original, noise = rng.normal(size=(2, 300))
    other = original + 0.3 * noise + 0.1
    found = compare(original, other)
    assert found.interval == pytest.approx(plain_interval(original, other[None], np.ones(300)), abs=0.006)
    assert found.p_value is None and found.differs
    assert found.interval == compare(original, other).interval  # seeded
    assert found.interval != compare(original, other, seed=1).interval


def test_interval_of_right_or_wrong_items_which_are_drawn_by_their_kind() -> None:
    rng = np.random.default_rng(2)
    original = (rng.random(400) < 0.7).astype(float)
    other = np.where(rng.random(400) < 0.8, original, 1 - original)
    found = compare(original, other)
    assert found.interval == pytest.approx(plain_interval(original, other[None], np.ones(400)), abs=0.006)


def test_interval_with_weights() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(1, 30, 200).astype(float)
    original = words * rng.normal(2.0, 0.3, 200)
    other = original + words * rng.normal(1.0, 0.2, 200)
    found = compare(original, other, words, chance=None)
    assert found.interval == pytest.approx(plain_interval(original, other[None], words), abs=0.006)


def test_an_interval_without_zero_is_not_enough_for_right_or_wrong_items() -> None:
    original = np.ones(100)
    found = compare(original, np.r_[np.zeros(5), np.ones(95)])
    assert found.interval[1] < 0 and found.p_value == pytest.approx(2 / 32) and not found.differs


def test_weights_make_it_a_ratio() -> None:
    nats, words = np.array([10.0, 40.0, 33.0]), np.array([5.0, 10.0, 15.0])
    found = compare(nats, 1.1 * nats, words, chance=None)
    assert found.original == pytest.approx(83 / 30)
    assert found.difference == pytest.approx(8.3 / 30)
    ratio, d = 8.3 / 30, 0.1 * nats
    assert found.standard_error == pytest.approx(math.sqrt(((d - ratio * words) ** 2).sum() * 3 / 2) / 30)
    assert found.retained is None and found.retained_above_chance is None


def test_pooled_seeds_add_their_own_error() -> None:
    rng = np.random.default_rng(0)
    original = (rng.random(400) < 0.6).astype(float)
    seeds = np.stack([np.where(rng.random(400) < keep, original, 0) for keep in (0.7, 0.8, 0.9)])
    found, alone = compare(original, seeds), [compare(original, seed) for seed in seeds]
    assert found.seeds == 3 and found.p_value is None
    assert found.difference == pytest.approx(np.mean([c.difference for c in alone]))
    over_items = scipy.stats.sem(seeds.mean(0) - original)
    over_seeds = scipy.stats.sem(seeds.mean(1))
    assert found.standard_error == pytest.approx(math.hypot(over_items, over_seeds))
    assert found.interval == pytest.approx(plain_interval(original, seeds, np.ones(400)), abs=0.006)


def test_equal_models_do_not_differ() -> None:
    original = np.array([0.0, 1.0, 1.0, 0.0])
    found = compare(original, original)
    assert (found.difference, found.standard_error, found.interval) == (0, 0, (0, 0))
    assert found.p_value == 1 and not found.differs and found.retained == 100


@pytest.mark.parametrize(("lost", "differs"), [(3, False), (20, True)])
def test_a_difference_inside_its_error_is_none(lost: int, differs: bool) -> None:
    original = np.ones(100)
    other = np.r_[np.zeros(lost), np.ones(100 - lost)]
    assert compare(original, other).differs is differs


def test_retained() -> None:
    assert retained(0.5, 0.4) == pytest.approx(80)
    assert retained(0.5, 0.4, chance=0.25) == pytest.approx(60)
    assert retained(0.25, 0.3, chance=0.25) is None
    found = compare(np.array([1.0, 1, 1, 0]), np.array([1.0, 1, 0, 0]), chance=0.25)
    assert (found.retained, found.retained_above_chance) == (pytest.approx(200 / 3), pytest.approx(50))


def test_a_groups_errors_add_in_squares() -> None:
    rng = np.random.default_rng(0)
    found = {}
    for task in "ab":
        original = (rng.random(200) < 0.8).astype(float)
        found[task] = compare(original, np.where(rng.random(200) < 0.8, original, 0), chance=0.5)
    mean = mean_of(found, {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.25})
    a, b = found["a"], found["b"]
    assert mean.difference == pytest.approx((a.difference + b.difference) / 2)
    assert mean.standard_error == pytest.approx(math.hypot(a.standard_error, b.standard_error) / 2)
    assert mean.retained_above_chance == pytest.approx(100 * (mean.other - 0.375) / (mean.original - 0.375))
    assert mean.differs and mean.items == 400


@pytest.mark.parametrize("arrays", [([], []), ([1.0], [1.0, 0.0])])
def test_other_items_are_refused(arrays: Any) -> None:
    with pytest.raises(ValueError, match="differ"):
        compare(np.array(arrays[0]), np.array(arrays[1]))
