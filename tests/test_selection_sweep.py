"""Sweep and greedy choice against plans evaluated one by one, and what is kept of them."""

import dataclasses
import shutil
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
from lp_train.errors import UserError
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import AutoPairs, pair_layers, unpair_layers
from lp_train.pairing.families import decoder_of
from lp_train.selection.calibration import Calibration
from lp_train.selection.greedy import greedy
from lp_train.selection.stack import Stack
from pair_analysis import sweep as module
from pair_analysis.sweep import all_windows, sweep, windows

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
    original = measure(pair_layers(model, "0:2"), packed_rows(), COLLATE, 3, {})["sequential"].nll
    unpair_layers(model)
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


def test_a_sweep_does_not_depend_on_the_batches() -> None:
    model = CASES["llama"].model()
    whole = calibration_of(model, rows=packed_rows(8), batch_size=8)
    assert whole.batch_size == 2  # four parts at least
    one = dataclasses.replace(whole, batch_size=1)
    assert one.folder == whole.folder
    found = [calibration.total(all_windows, LAYERS, "sweep") for calibration in (whole, one)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


# --- what is kept


def forwards(model: nn.Module) -> list[int]:
    """Grows with every call of the first layer: once for each batch that is run."""
    calls: list[int] = []
    decoder_of(model).layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_stopped_sweep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = CASES["llama"].model(), []
    whole = module.all_windows

    def stopped(stack: Stack) -> Any:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        yield from whole(stack)

    calibration = calibration_of(model, "par", rows=packed_rows(6))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "all_windows", stopped)
        sweep(calibration)
    calls = forwards(model)
    found = sweep(calibration)
    assert len(calls) == 3  # the other batches of one row
    assert sweep(calibration) == found and len(calls) == 3
    assert [path.name for path in calibration.folder.iterdir()] == ["sweep.json"]
    (calibration.folder / "sweep.json").unlink()
    assert sweep(calibration) == found  # at one go


def test_a_greedy_path_is_read_and_extended() -> None:
    model = CASES["llama"].model()
    one, again = greedy(calibration_of(model), AutoPairs("pairs", 1)), calibration_of(model)
    calls = forwards(model)
    two = greedy(again, AutoPairs("pairs", 2))
    assert len(calls) == 5 and two[:1] == one  # one more step: five batches of a row
    assert greedy(again, AutoPairs("pairs", 2)) == two and len(calls) == 5


def test_what_is_kept_is_told_apart_by_all_that_figures_depend_on() -> None:
    model, other = CASES["llama"].model(), CASES["llama"].model()
    with torch.no_grad():
        decoder_of(other).layers[3].mlp.down_proj.weight.mul_(1.01)  # fine-tuned, the embedding kept
    folders = [calibration_of(model).folder, calibration_of(other).folder, calibration_of(model, "par").folder]
    folders += [calibration_of(model, rows=packed_rows(seed=1)).folder, calibration_of(other.bfloat16()).folder]
    assert len(set(folders)) == len(folders)
    assert calibration_of(CASES["llama"].model()).folder == folders[0]


def test_figures_of_another_model_are_refused(tmp_path: Path) -> None:
    model, other = calibration_of(CASES["llama"].model()), calibration_of(CASES["llama"].model(seed=1))
    greedy(model, AutoPairs("pairs", 1))
    other.folder.mkdir(parents=True)
    shutil.copy(model.folder / "greedy.json", other.folder)
    says = f"greedy.json: made for another model \\({model.about['model']}, this is {other.about['model']}\\)"
    with pytest.raises(UserError, match=f"{says}; delete it"):
        greedy(other, AutoPairs("pairs", 1))
    (other.folder / "greedy.json").write_text("{")
    with pytest.raises(UserError, match="greedy.json: not a file of figures; delete it"):
        greedy(other, AutoPairs("pairs", 1))


# --- how many


def test_as_many_pairs_as_the_loss_allows() -> None:
    calibration = calibration_of(CASES["llama"].model())
    kls = [step.kl for step in greedy(calibration, AutoPairs("pairs", 2))]
    assert kls[0] < kls[1]
    for limit, count in ((kls[0], 1), ((kls[0] + kls[1]) / 2, 1), (kls[1], 2), (1e9, None)):
        found = greedy(calibration, AutoPairs("loss", limit))
        assert len(found) == (count or len(found)) and all(step.kl <= limit for step in found)
    taken = {layer for step in found for layer in (step.first, step.first + 1)}
    assert all({k, k + 1} & taken for k in range(LAYERS - 1))  # no limit: until there is no room
    with pytest.raises(UserError, match=r"the cheapest pair, \d-\d, costs 0\.\d+ nats per token already; allow more"):
        greedy(calibration, AutoPairs("loss", kls[0] / 2))


def test_no_room_for_as_many_pairs_one_after_the_other() -> None:
    """Layers 1 and 2 of four do next to nothing, so that theirs is the cheapest pair."""
    model = dataclasses.replace(CASES["llama"], options={"num_hidden_layers": 4}).model()
    with torch.no_grad():
        for layer in decoder_of(model).layers[1:3]:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    calibration = calibration_of(model)
    assert [step.first for step in greedy(calibration, AutoPairs("pairs", 1))] == [1]
    with pytest.raises(UserError, match="the cheapest leave room for 1 of 2 pairs; ask for 1 or give a window"):
        greedy(calibration, AutoPairs("pairs", 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_gives_nan_is_named(value: float) -> None:
    model = CASES["llama"].model()
    with torch.no_grad():
        decoder_of(model).layers[3].mlp.down_proj.weight[0, 0] = value
    for choose in (sweep, lambda calibration: greedy(calibration, AutoPairs("pairs", 1))):
        with pytest.raises(UserError, match="layer 3 (of the original )?gives NaN.*; check the checkpoint"):
            choose(calibration_of(model))


def test_an_embedding_that_gives_nan_is_named() -> None:
    model = CASES["llama"].model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = float("nan")
    with pytest.raises(UserError, match="the embedding of the original gives NaN"):
        sweep(calibration_of(model))


def test_pairs_that_overflow_are_told() -> None:
    found = calibration_of(CASES["llama"].model())
    with pytest.raises(UserError, match="layers side by side give NaN or infinite values where the original does not"):
        found.total(lambda stack: iter([torch.tensor([[1.0, float("inf")]], dtype=torch.float64)]), 1, "overflow")
