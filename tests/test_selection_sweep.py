"""Sweep and greedy choice against plans evaluated one by one, and what is kept of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from family_cases import CASES, LAYERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lp_train.data import RowCollator
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import AutoPairs, pair_layers, unpair_layers
from lp_train.selection.calibration import Calibration
from lp_train.selection.greedy import greedy
from lp_train.selection.sweep import sweep, windows

FAMILIES = ("llama", "gemma2", "smollm3-layer-types", "olmo2")
COLLATE = RowCollator(16, pad_token_id=0)


def packed_rows(number: int = 5, seed: int = 0) -> Dataset:
    """Rows of two documents, the last one with padding; some tokens are no labels."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for i in range(number):
        lengths = [7, 9] if i < number - 1 else [4, 5]
        ids = torch.randint(1, 64, (sum(lengths),), generator=generator).tolist()
        labels = [-100 if t in (0, lengths[0]) or t % 5 == i else token for t, token in enumerate(ids)]
        for name, value in zip(rows, (ids, labels, lengths), strict=True):
            rows[name].append(value)
    return Dataset.from_dict(rows)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LP_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calibration_of(model: nn.Module, algebra: str = "lp", rows: Dataset | None = None, **options: Any) -> Calibration:
    return Calibration(
        model, packed_rows() if rows is None else rows, COLLATE, algebra, PartialState(cpu=True), **options
    )


def cost_of(model: nn.Module, pairs: Any, algebra: str) -> tuple[float, float]:
    """NLL and KL of one plan by the evaluation that reports use."""
    pair_layers(model, pairs, algebra)
    found = measure(model, packed_rows(), COLLATE, 3, {"paired": as_it_is})["paired"]
    unpair_layers(model)
    return found.nll, found.kl


@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_window_costs_what_its_evaluation_says(family: str, algebra: str) -> None:
    model = CASES[family].model()
    found = sweep(calibration_of(model, algebra))
    assert sorted(found.costs) == sorted((s, n) for s in range(5) for n in (1, 2, 3) if s + 2 * n <= LAYERS)
    for (start, pairs), cost in found.costs.items():
        assert (cost.nll, cost.kl) == pytest.approx(cost_of(model, f"{start}:{start + 2 * pairs}", algebra), abs=1e-5)
    original = measure(pair_layers(model, "0:2"), packed_rows(), COLLATE, 3, {})["sequential"]
    assert found.original_nll == pytest.approx(original.nll, abs=1e-5)
    assert found.tokens == original.tokens.sum()


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 9), st.data())
def test_windows_of_any_depth(layers: int, data: st.DataObject) -> None:
    case = CASES["llama"]
    stack = dataclasses.replace(case, options={**case.options, "num_hidden_layers": layers}).model(seed=layers)
    found = sweep(calibration_of(stack))
    start, pairs = data.draw(st.sampled_from(windows(layers)))
    expected = cost_of(stack, f"{start}:{start + 2 * pairs}", "lp")
    assert (found.costs[start, pairs].nll, found.costs[start, pairs].kl) == pytest.approx(expected, abs=1e-5)
    assert found.best()[pairs] == min((c.kl, s) for (s, n), c in found.costs.items() if n == pairs)[1]


@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_takes_the_cheapest_pair_each_time(family: str, algebra: str) -> None:
    model = CASES[family].model()
    path = greedy(calibration_of(model, algebra), AutoPairs("pairs", 2))
    chosen: list[list[int]] = []
    for step in path:
        free = [k for k in range(LAYERS - 1) if not {k, k + 1} & {i for pair in chosen for i in pair}]
        costs = {k: cost_of(model, [*chosen, [k, k + 1]], algebra) for k in free}
        assert step.candidates == pytest.approx({k: kl for k, (_, kl) in costs.items()}, abs=1e-5)
        assert step.first == min(costs, key=lambda k: costs[k][1])
        assert (step.gap + original, step.kl) == pytest.approx(costs[step.first], abs=1e-5)
        chosen.append([step.first, step.first + 1])
    assert len(path) == 2
