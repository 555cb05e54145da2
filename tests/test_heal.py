"""Healing without gradients: the fit against equations, the base left alone, and the command on a tiny model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
import transformers as hf
from family_cases import CASES, PAIRS, VOCAB
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import heal as command
import lp_train
from lp_train import finetune
from lp_train.config import load_config
from lp_train.distill.replay import run_prefix
from lp_train.errors import UserError
from lp_train.evaluation.bench import Bench
from lp_train.pairing import adapters_off, pair_layers, sequential
from lp_train.pairing import heal as healing
from lp_train.pairing.families import decoder_of
from lp_train.pairing.heal import Moments, Stream, heal, reduced_rank, solve_in_turns

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(1, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))


def adapted(model: nn.Module, rank: int = 32, spec: Any = "2:6", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"target_modules": PROJECTIONS, "lora_alpha": 24, **options}
    return get_peft_model(pair_layers(model, spec), LoraConfig(r=rank, **options)).eval()


def streams(model: nn.Module, ids: Tensor = IDS, parts: int = 2) -> list[Stream]:
    every = torch.ones(ids.numel() // parts, dtype=torch.bool)
    return [Stream(*run_prefix(model, {"input_ids": part}), counts=every) for part in ids.chunk(parts)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def error(model: nn.Module) -> float:
    """Of the last hidden states to the original's."""
    with sequential(model):
        original = decoder_of(model)(IDS, use_cache=False).last_hidden_state
    return float((decoder_of(model)(IDS, use_cache=False).last_hidden_state - original).norm() / original.norm())


# --- the regressions -------------------------------------------------------------------------------------------------


def regression(inputs: int = 12, outputs: int = 5) -> tuple[np.ndarray, np.ndarray, Moments]:
    state = np.random.default_rng(0)
    x = state.normal(size=(200, inputs)) @ state.normal(size=(inputs, inputs))
    y = x @ state.normal(size=(inputs, outputs)) + state.normal(size=(200, outputs))
    moments = Moments()
    for part in (slice(0, 150), slice(150, 200)):
        moments.add(torch.tensor(x[part]), torch.tensor(y[part]))
    return x, y, moments


def loss(x: np.ndarray, y: np.ndarray, weight: Tensor) -> float:
    ridge = healing.RIDGE * (x**2).sum() / x.shape[1]
    return float(((y - x @ weight.numpy()) ** 2).sum() + ridge * (weight.numpy() ** 2).sum())


def test_the_fit_solves_the_ridge_regression() -> None:
    """As ordinary least squares on data with sqrt(ridge) I below them."""
    x, y, moments = regression()
    root = np.sqrt(healing.RIDGE * (x**2).sum() / x.shape[1])
    below = np.vstack([x, root * np.eye(x.shape[1])]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    expected = np.linalg.lstsq(*below, rcond=None)[0]
    assert np.abs(moments.solve().numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_of_a_rank_no_other_fit_is_better() -> None:
    """Gradient descent on the factors from many starts comes no lower."""
    x, y, moments = regression()
    found = reduced_rank(moments.solve(), moments.regularised(), 2)
    assert np.linalg.matrix_rank(found.numpy(), tol=1e-6) == 2
    best = min(loss(x, y, alternating(moments, seed)) for seed in range(5))
    assert loss(x, y, found) <= best * (1 + 1e-6)
    assert loss(x, y, found) == pytest.approx(best, rel=1e-3)


def alternating(moments: Moments, seed: int) -> Tensor:
    """W = A B of rank 2: the best A beside B, then the best B beside A, and so on."""
    xx, xy = moments.regularised(), moments.xy
    b = torch.randn(2, xy.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for _ in range(300):
        a = torch.linalg.solve(xx, xy @ torch.linalg.pinv(b))
        b = torch.linalg.solve(a.T @ xx @ a, a.T @ xy)
    return a @ b


def test_two_halves_have_a_rank_each() -> None:
    x, y, moments = regression()
    whole = reduced_rank(moments.solve(), moments.regularised(), 2)
    halves = solve_in_turns(moments, 2)
    assert [int(np.linalg.matrix_rank(half.numpy(), tol=1e-6)) for half in halves] == [2, 2]
    assert loss(x, y, torch.cat(halves)) < loss(x, y, whole)
    assert torch.equal(torch.cat(solve_in_turns(moments, 5)), moments.solve())


# --- models ----------------------------------------------------------------------------------------------------------


def test_full_rank_comes_closer_and_more_rank_more_so(tiny_llama: hf.LlamaForCausalLM) -> None:
    found = {}
    for rank in (2, 8, 32):
        model = adapted(copy_of(tiny_llama), rank)
        with adapters_off(model):
            untuned = error(model)
        heal(model, streams(model))
        found[rank] = error(model) / untuned
    assert found[32] < found[8] < found[2] < 1
    assert found[32] < 0.7


def copy_of(model: hf.LlamaForCausalLM) -> hf.LlamaForCausalLM:
    copied = hf.LlamaForCausalLM(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def test_the_base_is_bitwise_the_original(tiny_llama: hf.LlamaForCausalLM) -> None:
    original, weights = logits(tiny_llama), {n: p.clone() for n, p in tiny_llama.named_parameters()}
    model = adapted(tiny_llama)
    with adapters_off(model):
        untuned = logits(model)
    heal(model, streams(model))
    assert not torch.equal(logits(model), untuned)
    with adapters_off(model):
        assert torch.equal(logits(model), untuned)
    with sequential(model):
        assert torch.equal(logits(model), original)
    base = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    assert all(torch.equal(base[name], weight) for name, weight in weights.items())


def test_a_pair_is_fitted_to_its_layers_in_order(tiny_llama: hf.LlamaForCausalLM) -> None:
    """Full rank, one pair, each branch written out: what q, k, v read, what gate and up read, then the output."""
    model = adapted(tiny_llama, spec=[[4, 5]])
    layers = first, second = decoder_of(tiny_llama).layers[4:6]
    with torch.no_grad():
        stream = streams(model, parts=1)[0]
        x, (kwargs1, kwargs2) = stream.hidden, (kwargs for _, kwargs in stream.blocks[0])
        heal(model, [stream])
        with sequential(model):
            middle = first(x, **kwargs1)
            target = second(middle, **kwargs2)
            h1 = x + first.self_attn(hidden_states=first.input_layernorm(x), **kwargs1)[0]
            h2 = middle + second.self_attn(hidden_states=second.input_layernorm(middle), **kwargs2)[0]
        check_read(second.self_attn, second.input_layernorm(x), second.input_layernorm(middle), "qkv")
        h = x + first.self_attn(hidden_states=first.input_layernorm(x), **kwargs1)[0]
        h = h + second.self_attn(hidden_states=second.input_layernorm(x), **kwargs2)[0]
        for layer, in_order in zip(layers, (h1, h2), strict=True):
            norm = layer.post_attention_layernorm
            check_read(layer.mlp, norm(h), norm(in_order), ("gate", "up"))
        inner, output = [], h
        for layer in layers:
            mlp, read = layer.mlp, layer.post_attention_layernorm(h)
            inner.append(torch.nn.functional.silu(mlp.gate_proj(read)) * mlp.up_proj(read))
            output = output + mlp.down_proj.get_base_layer()(inner[-1])
        expected = ridge(flat(torch.cat(inner, -1)), flat(target - output))
        found = np.hstack([delta(layer.mlp.down_proj) for layer in layers]).T
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def check_read(block: nn.Module, read: Tensor, wanted: Tensor, names: Any) -> None:
    """Each projection's change is its weight times that of what it reads."""
    change = ridge(flat(read), flat(wanted - read))
    for name in names:
        module = getattr(block, f"{name}_proj")
        expected = module.get_base_layer().weight.numpy() @ change.T
        assert np.abs(delta(module) - expected).max() < 1e-3 * np.abs(expected).max()


def flat(tensor: Tensor) -> np.ndarray:
    return tensor.flatten(0, 1).double().numpy()


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    xx = x.T @ x
    return np.linalg.solve(xx + healing.RIDGE * xx.trace() / len(xx) * np.eye(len(xx)), x.T @ y)


def delta(module: Any) -> np.ndarray:
    a, b = (getattr(module, name)["default"].weight.double().numpy() for name in ("lora_A", "lora_B"))
    return module.scaling["default"] * b @ a


def test_tokens_that_do_not_count_change_nothing(tiny_llama: hf.LlamaForCausalLM) -> None:
    results = []
    for noise in (0, 1):
        model = adapted(copy_of(tiny_llama), rank=4)
        ids = torch.cat([IDS, (IDS + noise) % VOCAB], 1)
        given = streams(model, ids, parts=1)
        given[0].counts = (torch.arange(ids.numel()) % ids.shape[1]) < IDS.shape[1]
        heal(model, given)
        results.append(logits(model))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "smollm3", "mistral"])
def test_families_without_a_norm_after_the_mlp(family: str) -> None:
    targets = r".*(self_attn|mlp)\.\w+_proj"
    model = adapted(CASES[family].model(), spec=PAIRS, target_modules=targets)
    with adapters_off(model):
        untuned = error(model)
    heal(model, streams(model))
    assert error(model) < untuned


Mistake = Callable[[hf.LlamaForCausalLM], nn.Module]
REFUSED: dict[str, tuple[Mistake, str]] = {
    "a norm after the MLP": (
        lambda _: adapted(CASES["gemma2"].model(), spec=PAIRS),
        "model type 'gemma2': a norm after its MLP.*; train it, or heal one of gpt_oss, llama",
    ),
    "experts": (
        lambda _: adapted(CASES["gpt_oss"].model(), spec=PAIRS),
        "no adapter on mlp.down_proj of layer 0; add down_proj to lora.target_modules",
    ),
    "no adapter there": (lambda m: adapted(m, target_modules=["q_proj"]), "no adapter on mlp.down_proj of layer 2"),
    "DoRA": (lambda m: adapted(m, use_dora=True), "lora.use_dora true: .*leave it out to heal"),
    "not finite": (lambda m: adapted(with_nan(m)), "activations are not finite on this text; use model.dtype float32"),
}


def with_nan(model: hf.LlamaForCausalLM) -> hf.LlamaForCausalLM:
    model.model.embed_tokens.weight.data[int(IDS[0, 0])] = torch.nan
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_healed_is_said_in_one_line(tiny_llama: hf.LlamaForCausalLM, name: str) -> None:
    make, message = REFUSED[name]
    model = make(tiny_llama)
    with pytest.raises(UserError, match=message) as raised:
        heal(model, streams(model))
    assert "\n" not in str(raised.value)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("heal")
    model = tiny_run.save_model(folder / "model", tiny_tokenizer)
    return tiny_run.write_config(folder / "tiny.yaml", model, tiny_run.write_text(folder / "text.jsonl", 400))


@pytest.fixture(scope="module")
def healed(config: Path) -> Path:
    folder = config.parent / "healed"
    assert command.main([str(config), "--tokens", "4096", "--rank", "8", "--out", str(folder)]) == 0
    return folder


def test_the_result_is_a_run_that_loads(healed: Path) -> None:
    report = json.loads((healed / "report.json").read_text())
    assert report["heal"]["rank"] == 8 and 3500 < report["heal"]["tokens"] <= 4096
    assert report["recovered"]["kl"] < 0.8 * report["paired"]["kl"]
    assert "closed-form fit on" in (healed / "report.md").read_text()
    assert "scripts/heal.py" in (healed / "report.md").read_text()
    model, tokenizer = lp_train.load(str(healed))
    ids = tokenizer("A list is", return_tensors="pt").input_ids
    with torch.no_grad(), adapters_off(model):
        untuned = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, untuned)


def test_full_rank(config: Path, healed: Path) -> None:
    folder = config.parent / "full"
    assert command.main([str(config), "--tokens", "4096", "--rank", "full", "--out", str(folder)]) == 0
    full, ranked = (json.loads((path / "report.json").read_text()) for path in (folder, healed))
    assert full["heal"]["rank"] == 32
    assert full["recovered"]["kl"] < ranked["recovered"]["kl"]


def test_training_goes_on_from_it(config: Path, healed: Path) -> None:
    folder = config.parent / "trained"
    arguments = ["lora.r=8", f"lora.start_from={healed}", f"train.output_dir={folder}", "train.learning_rate=1e-9"]
    assert finetune.main([str(config), *arguments]) == 0
    trained, start = (json.loads((path / "report.json").read_text()) for path in (folder, healed))
    assert trained["recovered"]["kl"] == pytest.approx(start["recovered"]["kl"], rel=1e-4)


def test_training_heals_first(config: Path, healed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = config.parent / "healed-and-trained"
    options = [
        "lora.r=8",
        "lora.start_from=heal",
        "lora.heal_tokens=4096",
        "train.learning_rate=1e-9",
        "train.max_steps=16",
    ]
    assert finetune.main([str(config), *options, f"train.output_dir={folder}"]) == 0
    report, alone = (json.loads((path / "report.json").read_text()) for path in (folder, healed))
    assert 3500 < report["healed_start"]["tokens"] <= 4096
    assert report["paired"] == alone["paired"]
    assert report["recovered"]["kl"] == pytest.approx(alone["recovered"]["kl"], rel=0.1)  # of other rows
    assert "from a healed start" in (folder / "report.md").read_text()

    capfd.readouterr()
    assert finetune.main([str(config), *options, f"train.output_dir={folder}", "--resume"]) == 0
    resumed = json.loads((folder / "report.json").read_text())
    assert "healed: " not in capfd.readouterr().out and resumed["healed_start"] == {}
    assert resumed["recovered"] == report["recovered"] and "a healed start" in (folder / "report.md").read_text()


def test_the_rows_of_a_fit_are_drawn() -> None:
    """Packed rows stand by length: the first ones are those of the longest documents."""
    rows = [{"n": i} for i in range(100)]
    config = SimpleNamespace(train={"seed": 0, "max_length": 4}, evaluate=SimpleNamespace(batch_size=5))
    taken: list[int] = []

    def collate(batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        taken.extend(row["n"] for row in batch)
        return {name: torch.zeros(len(batch), 4) for name in ("input_ids", "position_ids")}

    bench = Bench(config, SimpleNamespace(train=rows), SimpleNamespace(), SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    vars(bench)["collate"] = collate
    assert len(list(bench.batches_of(60))) == 3
    assert len(set(taken)) == 15 and max(taken) > 50
    first = list(taken)
    list(bench.batches_of(60))
    assert taken == first * 2


def test_no_fit_on_the_cpus_of_fsdp2(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"lora.start_from 'heal': under FSDP2 .*; make it with scripts/heal.py"):
        finetune.start_folder(load_config(config, ["lora.start_from=heal", "lora.heal_tokens=4096"]))


MISTAKES = {
    "too few tokens": (["--tokens", "63"], "--tokens 63: less than one row of train.max_length 64; give at least 64"),
    "rank 0": (["--rank", "0"], "lora.r 0: a rank is at least 1"),
    "no rank": (["--rank", "half"], "lora.r 'half': expected an integer"),
    "tune full": (["tune=full"], "tune 'full': the fit is written into adapters; use tune: lora"),
    "a run there": (["--out", "{healed}"], "healed': not empty; .* --overwrite"),
    "no down projection": (["lora.target_modules=[q_proj]"], "no adapter on mlp.down_proj of layer 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    config: Path, healed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    given, message = MISTAKES[name]
    arguments = [part.replace("{healed}", str(healed)) for part in given]
    assert command.main([str(config), "--out", str(tmp_path / "out"), *arguments]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
