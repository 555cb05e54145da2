"""Memory by rule, against what autograd saves."""

import dataclasses

import pytest
import torch
from bench_cases import SHAPES, Configure, configure
from family_cases import CASES, COMMON
from test_bench_shapes import PUBLISHED
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lp_train.adapters import adapted_layers, attach
from lp_train.bench.memory import activation_bytes, memory_gib
from lp_train.bench.shapes import layer_shape, trainable_parameters
from lp_train.config import Config
from lp_train.distill.replay import run_original, run_suffix
from lp_train.pairing import PairPlan, pair_layers

__all__ = ["configure"]


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
def test_activations_are_what_autograd_saves(name: str, scope: str, configure: Configure) -> None:
    case, length = CASES[name], 256
    wide = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "sliding_window": 4 * length}
    hf_config = case.config(**{**COMMON, **case.options, **wide})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=case.attention, dtype=torch.bfloat16)
    config, plan = configure(f"lora.scope={scope}"), PairPlan.parse([[1, 2]], 6)
    saved = saved_bytes(attach(pair_layers(model, plan), plan, config), length)
    adapted = adapted_layers(plan, config)
    eager = length if case.attention == "eager" else 0
    by_rule = sum(activation_bytes(layer_shape(hf_config, i), 256, 2, i in adapted, eager) for i in range(1, 6))
    assert by_rule * length == pytest.approx(saved, rel=0.12)


LLAMA = AutoConfig.from_pretrained(SHAPES / "Llama-3.2-1B.json")
PLAN = PairPlan.parse([[0, 1], [3, 4]], 16)


def memory(config: Config, rows: int = 8, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    return memory_gib(LLAMA, PLAN, config, rows, dtype, chunk=1024)


def test_memory_items(configure: Configure) -> None:
    items, trained = memory(configure()), 4 * trainable_parameters(LLAMA, PLAN, configure())
    assert items["frozen base weights"] == PUBLISHED["Llama-3.2-1B"] * 2 / 2**30
    assert items["trained weights, float32"] == items["gradients, float32"] == trained / 2**30
    assert items["AdamW states, float32"] == 2 * trained / 2**30
    assert items["logits of a chunk"] == 28 * 1024 * 128256 / 2**30


def test_memory_follows_the_switches(configure: Configure) -> None:
    config, plain = configure(), memory(configure())
    assert memory(config, rows=16)["activations"] == 2 * plain["activations"]
    assert memory(config, dtype=torch.float32)["frozen base weights"] == 2 * plain["frozen base weights"]
    quantised = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="nf4"))
    assert 0.4 < memory(quantised)["frozen base weights"] / plain["frozen base weights"] < 0.5


def test_checkpointed_blocks_keep_their_input_and_one_is_run_again_at_a_time(configure: Configure) -> None:
    config = configure("train.gradient_checkpointing=true")
    every = {
        n: memory(dataclasses.replace(config, train={**config.train, "gradient_checkpointing_every": n}))["activations"]
        for n in (1, 2, 14)
    }
    plain = memory(configure())["activations"]
    assert every[1] < plain / 3
    assert every[1] < every[2] < plain
    # of 14 blocks only the first pair is checkpointed, and it is run again: its input is all that comes to the rest
    tokens, width = 8 * config.train["max_length"], LLAMA.hidden_size
    assert every[14] - plain == pytest.approx(tokens * 2 * width / 2**30)
