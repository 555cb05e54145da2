"""What is trained: which modules get adapters, which weights move, and that the original stays the teacher."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from family_cases import CASES, PAIRS
from torch import nn

from lp_train.adapters import attach, count_parameters, projections
from lp_train.config import Config, load_config
from lp_train.errors import UserError
from lp_train.pairing import PairPlan, keep_originals, pair_layers, sequential

SPEC = [[1, 2], [4, 5]]  # layer 3 is in the suffix and in no pair
IDS = torch.arange(5, 25)[None]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Configured = Callable[..., Config]


@pytest.fixture
def configured(tmp_path: Path) -> Configured:
    def make(tune: str = "lora", **lora: Any) -> Config:
        sections = {"model": {"name_or_path": "x"}, "plan": {"pairs": SPEC}, "data": {"train": "builtin:pydocs"}}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**sections, "tune": tune, "lora": lora, "train": {"max_steps": 1}}))
        return load_config(path)

    return make


def paired_with_adapters(model: nn.Module, config: Config, spec: Any = SPEC) -> nn.Module:
    plan = PairPlan.parse(spec, num_layers=model.config.num_hidden_layers)
    return attach(pair_layers(model, plan), plan, config)


def adapted(model: nn.Module) -> set[str]:
    """Names of the modules with an adapter, as the base calls them."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


def names(layers: Any, modules: tuple[str, ...] = ATTENTION + MLP) -> set[str]:
    parents = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
    return {f"model.layers.{i}.{parents[module]}.{module}" for i in layers for module in modules}


# --- which modules ---------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all of the paired layers": ({}, names([1, 2, 4, 5])),
    "all from the first pair on": ({"scope": "suffix"}, names([1, 2, 3, 4, 5])),
    "all-linear": ({"target_modules": "all-linear"}, names([1, 2, 4, 5])),
    "a list": ({"target_modules": ["q_proj", "down_proj"]}, names([1, 2, 4, 5], ("q_proj", "down_proj"))),
    "a list of paths": ({"target_modules": ["mlp.up_proj", "4.self_attn.v_proj"]}, names([1, 2, 4, 5], ("up_proj",))),
    "a pattern": ({"target_modules": r".*\.(q|v)_proj"}, names([1, 2, 4, 5], ("q_proj", "v_proj"))),
    "a pattern of one layer": ({"target_modules": r"model\.layers\.4\.mlp\..*"}, names([4], MLP)),
    "a list in the suffix": ({"target_modules": ["o_proj"], "scope": "suffix"}, names([1, 2, 3, 4, 5], ("o_proj",))),
}
TARGETS["a list of paths"][1].add("model.layers.4.self_attn.v_proj")


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_are_where_they_were_asked_for(
    tiny_llama: hf.LlamaForCausalLM, configured: Configured, name: str
) -> None:
    options, expected = TARGETS[name]
    model = paired_with_adapters(tiny_llama, configured(**options))
    assert adapted(model) == expected
    trained = [parameter for parameter, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in parameter for parameter in trained)


@pytest.mark.parametrize("targets", ["layers.1.mlp", ["c_attn"], ["lm_head"], ["layers.3.mlp.up_proj"]])
def test_targets_outside_the_pairs_are_no_targets(
    tiny_llama: hf.LlamaForCausalLM, configured: Configured, targets: Any
) -> None:
    with pytest.raises(UserError, match=f"^lora.target_modules {re.escape(repr(targets))}: .*there are .*q_proj"):
        paired_with_adapters(tiny_llama, configured(target_modules=targets))


@pytest.mark.parametrize("targets", [None, "all-linear", [*ATTENTION, *MLP, "gate", "router", "mlp"]])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_routers_are_never_adapted(configured: Configured, family: str, targets: Any) -> None:
    model = paired_with_adapters(CASES[family].model(), configured(target_modules=targets), PAIRS)
    assert any(re.search(r"mlp\.(gate|router)$", name) for name, _ in model.named_modules())
    assert adapted(model) == names([0, 1, 3, 4], ATTENTION)  # layer 1 of qwen3_moe has a dense MLP


@pytest.mark.parametrize("targets", [["gate"], ["router"], r".*mlp\.(gate|router)"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_routers_cannot_be_asked_for(configured: Configured, family: str, targets: Any) -> None:
    with pytest.raises(UserError, match="matches no projection"):
        paired_with_adapters(CASES[family].model(), configured(target_modules=targets), PAIRS)


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.router", "mlp.shared_expert_gate", "feed_forward.router"])
def test_linear_routers_are_no_projections(tiny_llama: hf.LlamaForCausalLM, name: str) -> None:
    """Families whose router is a plain linear layer."""
    parent, _, child = name.rpartition(".")
    layer = tiny_llama.model.layers[1]
    if not hasattr(layer, parent):
        layer.add_module(parent, nn.Module())
    layer.get_submodule(parent).add_module(child, nn.Linear(32, 4))
    assert set(projections(tiny_llama, [1])) == names([1], ATTENTION)


def test_parameters_are_counted(tiny_llama: hf.LlamaForCausalLM, configured: Configured) -> None:
    before = sum(p.numel() for p in tiny_llama.parameters())
    model = paired_with_adapters(tiny_llama, configured(r=4, target_modules=["q_proj", "down_proj"]))
    added = 4 * (4 * (32 + 32) + 4 * (64 + 32))  # layers x (rank x (in + out)) of q_proj and of down_proj
    assert count_parameters(model) == (added, before + added)


# --- the teacher -----------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "biases of its own": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "norms saved too": {"modules_to_save": ["input_layernorm"]},
    "suffix": {"scope": "suffix"},
}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):  # after one step only the adapters' B has moved
        optimizer.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_original_after_steps(
    tiny_llama: hf.LlamaForCausalLM, configured: Configured, kind: str
) -> None:
    original = logits(tiny_llama)
    model = paired_with_adapters(tiny_llama, configured(**KINDS[kind]))
    before = logits(model)
    step(model)
    assert not torch.equal(logits(model), before)
    with sequential(model):
        assert torch.equal(logits(model), original)


def test_full_training_moves_the_paired_layers_alone(tiny_llama: hf.LlamaForCausalLM, configured: Configured) -> None:
    original, start = logits(tiny_llama), {name: p.clone() for name, p in tiny_llama.named_parameters()}
    plan = PairPlan.parse(SPEC, num_layers=6)
    keep_originals(pair_layers(tiny_llama, plan))
    model = attach(tiny_llama, plan, configured("full"))
    before = logits(model)
    step(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if re.match(r"model\.layers\.(1|2|4|5)\.", name)}
    assert not torch.equal(logits(model), before)
    with sequential(model):
        assert torch.equal(logits(model), original)
    assert list(dict(model.named_parameters())) == list(start)


def test_full_training_is_in_float32(tiny_llama: hf.LlamaForCausalLM, configured: Configured) -> None:
    plan = PairPlan.parse(SPEC, num_layers=6)
    model = attach(pair_layers(tiny_llama.bfloat16(), plan), plan, configured("full"))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {dtypes[name] for name in trained} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - trained} == {torch.bfloat16}
