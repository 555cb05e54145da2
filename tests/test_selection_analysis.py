"""Cheap scores, interventions and the comparison against the same computed plainly, one document at a time."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_cases import CASES, LAYERS
from test_selection_sweep import calibration_of, packed_rows
from torch import Tensor, nn

from lp_train.errors import UserError
from lp_train.pairing import pair_layers, unpair_layers
from lp_train.pairing.families import decoder_of
from pair_analysis.compare import compare
from pair_analysis.interventions import KINDS, interventions, lengths
from pair_analysis.plots import intervention_map
from pair_analysis.scores import rank_correlations, scores
from pair_analysis.sweep import Cost, Sweep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LP_TRAIN_CACHE", str(tmp_path / "cache"))


def documents() -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels [1, T] of each document of the rows, alone."""
    found = []
    for row in packed_rows():
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            found.append((torch.tensor([row["input_ids"][part]]), torch.tensor([row["labels"][part]])))
            start += length
    return found


@torch.no_grad()
def nll_of(model: nn.Module) -> float:
    """Nats per labelled token, each document alone, from whole logits."""
    losses = [
        F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="none")
        for ids, labels in documents()
    ]
    kept = torch.cat([labels[0, 1:] for _, labels in documents()]) != -100
    return float(torch.cat(losses)[kept].double().mean())


def with_layers(model: nn.Module, layers: list[nn.Module]) -> nn.Module:
    changed = copy.deepcopy(model)
    decoder_of(changed).layers = nn.ModuleList(layers)
    changed.config.num_hidden_layers = len(layers)
    return changed


class Parallel(nn.Module):
    """All layers on the same input, their updates added."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + sum(layer(x, **kwargs) - x for layer in self.layers)


def changed(model: nn.Module, kind: str, start: int, n: int) -> nn.Module:
    """The model with its window in another way; llama's layers are all called alike."""
    layers = list(decoder_of(model).layers)
    window, end = layers[start : start + n], start + n
    if kind == "pairs":
        return pair_layers(copy.deepcopy(model), f"{start}:{end}")
    if kind == "merge":
        merged = copy.deepcopy(window[0])
        for name, p in merged.named_parameters():
            p.data = torch.stack([layer.get_parameter(name).detach() for layer in window]).mean(0)
        window = [merged]
    window = {"reverse": window[::-1], "drop": [], "parallel": [Parallel(window)]}.get(kind, window)
    return with_layers(model, [*layers[:start], *window, *layers[end:]])


def test_interventions_are_what_their_definitions_say() -> None:
    model = CASES["llama"].model()
    found, original = interventions(calibration_of(model)), nll_of(model)
    assert list(found) == ["reverse", "drop", "merge", "parallel", "pairs"] == list(KINDS)
    for kind, grid in found.items():
        assert sorted(grid) == [
            (s, n) for s in range(LAYERS) for n in range(1, LAYERS - s + 1) if n in lengths(kind, LAYERS)
        ]
        for (start, n), gap in grid.items():
            expected = nll_of(changed(model, kind, start, n)) - original
            assert gap == pytest.approx(expected, abs=2e-5), (kind, start, n)


def test_interventions_leave_the_model_and_are_kept() -> None:
    model = CASES["gemma2"].model()
    before = copy.deepcopy(model.state_dict())
    found = interventions(calibration_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (calibration_of(model).folder / "interventions.json").exists()
    assert interventions(calibration_of(model)) == found


def test_layers_without_a_mean_are_refused() -> None:
    with pytest.raises(
        UserError, match="interventions: merging needs layers of equal shape, not quantised; this model"
    ):
        interventions(calibration_of(CASES["qwen3_moe"].model()))


# --- scores


def recorded(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The input of every layer and the output of the last, and what each is called with."""
    states: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def before(layer: nn.Module, arguments: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        states.append(arguments[0])
        calls.append(kwargs)

    layers = decoder_of(model).layers
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda layer, given, output: states.append(output)))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states, calls


@torch.no_grad()
def plain_scores(model: nn.Module) -> np.ndarray:
    """[pairs, 5], token by token in float64, by calling layers on recorded states."""
    layers, rows, tokens = decoder_of(model).layers, np.zeros((LAYERS - 1, 5)), 0
    for ids, labels in documents():
        states, calls = recorded(model, ids)
        places = [t for t in range(ids.shape[1] - 1) if labels[0, t + 1] != -100]
        tokens += len(places)
        for k in range(LAYERS - 1):
            alone = layers[k + 1](states[k], **calls[k + 1])
            for t in places:
                x, y, z, a = (s[0, t].double().numpy() for s in (*states[k : k + 3], alone))
                change = np.linalg.norm((z - y) - (a - x))
                cosines = [float(p @ q) / np.linalg.norm(p) / np.linalg.norm(q) for p, q in ((x, z), (x, y), (y, z))]
                ratios = [change / np.linalg.norm(z - y), change / np.linalg.norm(z)]
                rows[k] += np.array([*ratios, *(1 - c for c in cosines)])
    return rows / tokens


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_scores_are_what_their_definitions_say(family: str) -> None:
    model = CASES[family].model()
    found = scores(calibration_of(model))
    np.testing.assert_allclose(np.array(list(found.values())).T, plain_scores(model), rtol=1e-4, atol=1e-6)


def test_scores_are_compared_with_single_pairs_only() -> None:
    costs = {(k, 1): Cost(0.0, float(kl)) for k, kl in enumerate([3, 1, 2])} | {(0, 2): Cost(0.0, 9.0)}
    found = rank_correlations({"same": [30.0, 10.0, 20.0], "opposite": [1.0, 3.0, 2.0]}, Sweep(4, 1, 0.0, costs))
    assert found == pytest.approx({"same": 1.0, "opposite": -1.0})


# --- the comparison


@pytest.mark.parametrize("sample", [None, 3])
def test_the_comparison_agrees_and_leaves_the_model_in_order(sample: int | None) -> None:
    model = CASES["gemma2"].model()
    found = compare(calibration_of(model, "par"), sample)
    assert found["windows"] == 9 and found["sampled"] == (9 if sample is None else 3)
    assert found["largest_difference"] < 1e-5
    assert found["whole_forward_ratio"] == pytest.approx(found["whole_forward_seconds"] / found["sweep_seconds"])
    with pytest.raises(UserError, match="no paired layers"):
        unpair_layers(model)


@pytest.mark.parametrize(("dearest", "top"), [(0.5, 0.5), (200.0, 10.0)])
def test_the_scale_of_a_map_ends_with_its_dearest_window_or_where_models_guess(dearest: float, top: float) -> None:
    figure = intervention_map({kind: {(0, 2): 0.4, (1, 2): dearest} for kind in KINDS})
    scale = next(axis for axis in figure.axes if axis.get_ylabel().startswith("NLL above"))
    assert scale.get_ylim() == pytest.approx((0.01, top))
