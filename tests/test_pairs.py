"""Pairs in place: what stays as it was (names, files, weights, modes), and what sequential mode gives back.

The numbers of the paired forward itself are in test_families.py; how it runs (caches, masks, checkpointing, compile)
is in test_pairs_run.py.
"""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from family_cases import CASES, PAIRS, VOCAB
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from lp_train.errors import UserError
from lp_train.pairing import (
    PairPlan,
    in_order,
    is_paired,
    keep_originals,
    pair_layers,
    plan_of,
    sequential,
    unpair_layers,
)

pytestmark = pytest.mark.filterwarnings(  # of `lora_bias` on layers without bias: no merging, 1-D tensors in the file
    "ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'.*invalid shape"
)

IDS = torch.randint(1, VOCAB, (2, 11), generator=torch.Generator().manual_seed(2))
ALTERNATING = ("llama", "gemma2", "gemma3", "gpt_oss")  # one plain family and those whose neighbours differ


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


@pytest.fixture
def llama() -> hf.PreTrainedModel:
    return CASES["llama"].model()


@pytest.fixture
def paired(llama: hf.PreTrainedModel) -> nn.Module:
    return pair_layers(llama, PAIRS)


def lora(**options: Any) -> LoraConfig:
    """Adapters with B other than zero, so that leaving them on is seen."""
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return LoraConfig(r=4, **{"target_modules": targets, "init_lora_weights": False, **options})


ADAPTERS: dict[str, Callable[[], LoraConfig]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True, lora_dropout=0.1),
    "lora-bias": lambda: lora(lora_bias=True),
    "norm-saved": lambda: lora(modules_to_save=["input_layernorm", "post_attention_layernorm"]),
}


@torch.no_grad()
def perturb(model: nn.Module, names: str = "", scale: float = 0.1) -> None:
    """A training step, as far as these tests care: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.requires_grad and names in name:
            p += scale * torch.randn(p.shape, generator=generator)


# --- the original is always there


@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("name", ALTERNATING)
def test_sequential_is_bitwise_the_original(name: str, algebra: str) -> None:
    model = CASES[name].model()
    original = logits(model)
    pair_layers(model, PAIRS, algebra)
    assert not torch.allclose(logits(model), original, rtol=0.01)
    with sequential(model) as inside:
        assert inside is model
        assert torch.equal(logits(model), original)
    assert not torch.allclose(logits(model), original, rtol=0.01)


@pytest.mark.parametrize("first", ["pairs first", "adapters first"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_sequential_is_bitwise_the_original_with_adapters(llama: hf.PreTrainedModel, kind: str, first: str) -> None:
    original = logits(llama)
    if first == "pairs first":
        model: nn.Module = get_peft_model(pair_layers(llama, PAIRS), ADAPTERS[kind]())
    else:
        model = pair_layers(get_peft_model(llama, ADAPTERS[kind]()), PAIRS)
    with in_order(model):
        untouched = logits(model)
    perturb(model)
    with sequential(model):
        assert torch.equal(logits(model), original)
    with in_order(model):  # adapters stay on here, and the steps have changed them
        assert not torch.allclose(logits(model), original, rtol=0.01)
        assert not torch.allclose(logits(model), untouched, rtol=0.01)


@pytest.mark.parametrize("algebra", ["lp", "par"])
def test_unpair_restores_the_model_bitwise(llama: hf.PreTrainedModel, algebra: str) -> None:
    original, classes = logits(llama), [type(layer) for layer in llama.model.layers]
    attributes = [set(vars(layer)) for layer in llama.model.layers]
    pair_layers(llama, PAIRS, algebra)
    keep_originals(llama)
    logits(llama)
    assert unpair_layers(llama) is llama
    assert torch.equal(logits(llama), original)
    assert [type(layer) for layer in llama.model.layers] == classes
    assert [set(vars(layer)) for layer in llama.model.layers] == attributes
    assert not is_paired(llama)
    assert "layer_parallel" not in llama.config.to_dict()
    assert is_paired(pair_layers(llama, "2:4"))


def test_unpair_keeps_what_was_trained(paired: nn.Module) -> None:
    perturb(paired)
    with sequential(paired):
        trained = logits(paired)
    assert torch.equal(logits(unpair_layers(paired)), trained)


def test_keep_originals_is_the_teacher_of_a_full_tune(llama: hf.PreTrainedModel) -> None:
    original, names = logits(llama), [name for name, _ in llama.named_parameters()]
    keep_originals(pair_layers(llama, PAIRS))
    before = logits(llama)
    for i in PairPlan.parse(PAIRS, 6).layers:
        perturb(llama, f"layers.{i}.")
    assert not torch.allclose(logits(llama), before, rtol=0.01)
    with sequential(llama):
        assert torch.equal(logits(llama), original)
    assert [name for name, _ in llama.named_parameters()] == names
    copies = [layer._original for layer in llama.model.layers if is_layer_paired(layer)]
    assert not any(p.requires_grad for copy_ in copies for p in copy_.parameters())
    assert all(p.requires_grad for p in llama.parameters())


def is_layer_paired(layer: nn.Module) -> bool:
    return "_pairing" in vars(layer)


def test_keep_originals_costs_the_paired_layers_only(paired: nn.Module) -> None:
    keep_originals(paired)
    kept = [i for i, layer in enumerate(paired.model.layers) if "_original" in vars(layer)]
    assert kept == [0, 1, 3, 4]
    layer = paired.model.layers[1]
    assert layer._original._first is paired.model.layers[0]  # a reference, not another copy of the layer


# --- names and files


@pytest.mark.parametrize("name", ALTERNATING)
def test_names_of_parameters_and_modules_stay(name: str) -> None:
    model = CASES[name].model()
    keys, modules = list(model.state_dict()), [n for n, _ in model.named_modules()]
    tensors = [p.data_ptr() for p in model.parameters()]
    pair_layers(model, PAIRS)
    keep_originals(model)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == modules
    assert [p.data_ptr() for p in model.parameters()] == tensors


def test_a_saved_model_has_the_original_names_and_the_plan(paired: nn.Module, tmp_path: Path) -> None:
    names = list(CASES["llama"].model().state_dict())
    paired.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_parallel"] == {"pairs": [[0, 1], [3, 4]], "algebra": "lp"}
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(names)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_paired(loaded)
    with sequential(paired):
        assert torch.equal(logits(loaded), logits(paired))
    plan = loaded.config.layer_parallel
    assert torch.equal(logits(pair_layers(loaded, plan["pairs"], plan["algebra"])), logits(paired))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_have_the_paths_of_the_unpaired_model(kind: str) -> None:
    alone = get_peft_model(CASES["llama"].model(), ADAPTERS[kind]())
    ours = get_peft_model(pair_layers(CASES["llama"].model(), PAIRS), ADAPTERS[kind]())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in alone.named_parameters()]
    assert ours.targeted_module_names == alone.targeted_module_names


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_loads_on_the_plain_model(kind: str, tmp_path: Path) -> None:
    ours = get_peft_model(pair_layers(CASES["llama"].model(), PAIRS), ADAPTERS[kind]()).eval()
    perturb(ours)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CASES["llama"].model(), tmp_path).eval()
    with in_order(ours):
        assert torch.equal(logits(loaded), logits(ours))
    assert torch.equal(logits(pair_layers(loaded, PAIRS)), logits(ours))
    assert torch.equal(logits(unpair_layers(ours)), logits(unpair_layers(loaded)))


# --- copies


def test_a_deep_copy_is_paired_and_on_its_own(paired: nn.Module) -> None:
    keep_originals(paired)
    expected = logits(paired)
    twin = copy.deepcopy(paired)
    with sequential(paired):
        assert torch.equal(logits(twin), expected)
    assert twin.model.layers[1]._first is twin.model.layers[0]
    perturb(paired)
    assert torch.equal(logits(twin), expected)
    unpair_layers(paired)
    assert torch.equal(logits(twin), expected)
    assert plan_of(twin)[0].pairs == PAIRS


# --- modes


def test_sequential_nests(paired: nn.Module) -> None:
    side_by_side = logits(paired)
    with sequential(paired):
        in_sequence = logits(paired)
        with sequential(paired):
            assert torch.equal(logits(paired), in_sequence)
        assert torch.equal(logits(paired), in_sequence)
    assert torch.equal(logits(paired), side_by_side)


def test_sequential_is_left_after_an_exception(paired: nn.Module) -> None:
    model = get_peft_model(paired, lora()).eval()
    side_by_side = logits(model)
    with pytest.raises(ZeroDivisionError), sequential(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), side_by_side)


def test_a_forward_that_fails_leaves_no_trace(paired: nn.Module) -> None:
    side_by_side, second = logits(paired), paired.model.layers[1]
    handle = second.mlp.register_forward_hook(lambda *_: 1 / 0)
    for context in (contextlib.nullcontext(), sequential(paired)):
        with pytest.raises(ZeroDivisionError), context:
            logits(paired)
    handle.remove()
    assert torch.equal(logits(paired), side_by_side)
    assert not any(vars(layer).get("_kwargs") for layer in paired.model.layers)


def test_sequential_leaves_adapters_switched_off_by_the_user_off(paired: nn.Module) -> None:
    model = get_peft_model(paired, lora()).eval()
    with model.disable_adapter():
        off = logits(model)
        with sequential(model):
            pass
        assert torch.equal(logits(model), off)
    assert not torch.equal(logits(model), off)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_sequential_leaves_requires_grad_and_training_alone(paired: nn.Module, kind: str) -> None:
    model = get_peft_model(paired, ADAPTERS[kind]()).train()
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)

    def state() -> list[bool]:
        return [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]

    before = state()
    with sequential(model):
        assert state() == before
    assert state() == before
    assert not frozen.requires_grad


def test_a_step_after_the_teacher_trains_the_adapters(paired: nn.Module) -> None:
    """Gradients of the student are the same whether or not the teacher ran between forward and backward."""
    model = get_peft_model(paired, lora()).train()
    gradients = []
    for teacher_between in (False, True):
        model.zero_grad()
        loss = model(IDS, use_cache=False).logits.square().mean()
        if teacher_between:
            with torch.no_grad(), sequential(model):
                model(IDS, use_cache=False)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert gradients[0]
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*gradients, strict=True))


# --- mistakes


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


def test_pairing_twice_is_refused(paired: nn.Module) -> None:
    expected = logits(paired)
    message = one_line(lambda: pair_layers(paired, "2:4"))
    assert message == "the model is paired already; call unpair_layers(model) first"
    assert torch.equal(logits(paired), expected)
    assert plan_of(paired) == (PairPlan.parse(PAIRS, 6), "lp")


def test_a_plan_too_long_is_refused(llama: hf.PreTrainedModel) -> None:
    message = one_line(lambda: pair_layers(llama, "4:8"))
    assert message == "plan.pairs '4:8': pair 6-7 is out of range; the model has layers 0 to 5"
    assert not is_paired(llama)


def test_an_unknown_algebra_is_refused(llama: hf.PreTrainedModel) -> None:
    assert one_line(lambda: pair_layers(llama, PAIRS, "lpp")) == "plan.algebra 'lpp': unknown; use one of lp, par"
    assert not is_paired(llama)


@pytest.mark.parametrize("call", [lambda m: sequential(m).__enter__(), unpair_layers, keep_originals, plan_of])
def test_an_unpaired_model_is_refused(llama: hf.PreTrainedModel, call: Callable[[nn.Module], Any]) -> None:
    message = one_line(lambda: call(llama))
    assert message == "the model has no paired layers; call pair_layers(model, plan) first"
