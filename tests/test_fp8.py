"""FP8 products against float32; the product itself is replaced by its formula, as it needs a Hopper GPU."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lp_train.distill.fp8 import Fp8Linear, convert_linears, quantise
from lp_train.distill.replay import run_original
from lp_train.errors import UserError
from lp_train.pairing import pair_layers


def scaled_mm_by_formula(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    assert a.dtype == b.dtype == torch.float8_e4m3fn and b.stride(0) == 1  # the second factor by columns
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_by_formula)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 24), nn.Linear(24, 32)).bfloat16().requires_grad_(False)
    return model.append(nn.Linear(32, 16).bfloat16()).train()  # the last one is trained


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.float() - reference.float()).norm() / reference.float().norm())


def test_quantised_rows_are_within_the_precision_of_e4m3() -> None:
    x = torch.randn(16, 64) * torch.logspace(-4, 4, 16)[:, None]
    values, scale = quantise(x)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (16, 1)
    error = ((values.float() * scale - x).norm(dim=1) / x.norm(dim=1)).max()
    assert error < 0.04  # 3 bits of mantissa: at most 1/16 each
    assert quantise(torch.zeros(2, 16))[0].float().abs().max() == 0


def test_only_frozen_layers_of_sixteens_are_converted(layer: nn.Sequential) -> None:
    names = set(layer.state_dict())
    convert_linears([layer])
    assert [type(module) is Fp8Linear for module in layer] == [True, False, False, False]
    assert set(layer.state_dict()) == names  # the copies are not saved


def test_a_model_without_any_is_told(layer: nn.Sequential) -> None:
    with pytest.raises(UserError, match="train.fp8 true: the model has no frozen bf16 projections"):
        convert_linears([layer.float()])


def test_the_original_is_exact_in_eval_mode_and_rounded_in_training(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_by_formula)
    model, batch = pair_layers(tiny_llama.bfloat16().requires_grad_(False), "2:6"), {"input_ids": torch.arange(9)[None]}
    original = run_original(model, batch).final
    convert_linears(model.model.layers)
    assert torch.equal(run_original(model.eval(), batch).final, original)
    assert 0 < relative(run_original(model.train(), batch).final, original) < 0.2


def test_output_and_input_gradient_are_close_and_evaluation_is_bitwise(layer: nn.Sequential) -> None:
    linear = layer[0]
    x = torch.randn(2, 5, 64).bfloat16().requires_grad_()
    plain, weight = linear(x), torch.randn(2, 5, 32).bfloat16()
    (expected,) = torch.autograd.grad(plain, x, weight)
    convert_linears([layer])
    found = linear(x)
    (gradient,) = torch.autograd.grad(found, x, weight)
    assert 0 < relative(found, plain) < 0.06 and 0 < relative(gradient, expected) < 0.06
    assert torch.equal(linear.eval()(x), plain)
