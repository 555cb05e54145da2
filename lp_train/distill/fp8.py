"""Products with frozen weights in FP8 on Hopper and newer GPUs: e4m3 values, one scale per row of each factor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lp_train.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] -> e4m3 values [N, K] and float32 scales [N, 1], with x about values * scales."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(E4M3), scale


def product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x [N, K] times an e4m3 weight [M, K] with scales [M, 1] -> bf16 [N, M]."""
    values, scale = quantise(x)
    return torch._scaled_mm(
        values, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, weight_t: Tensor, scale_t: Tensor) -> Tensor:
        ctx.save_for_backward(weight_t, scale_t)
        return product(x.flatten(0, -2), weight, scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = product(grad.flatten(0, -2), *ctx.saved_tensors).view(*grad.shape[:-1], -1)
        return grad_x, None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer that multiplies in FP8 while gradients may flow or the model is in training mode."""

    @classmethod
    def convert(cls, linear: nn.Linear) -> None:
        """Changes the class in place; two FP8 copies of the weight, by rows and by columns, are kept beside it."""
        for name, weight in (("fp8", linear.weight), ("fp8_t", linear.weight.t().contiguous())):
            values, scale = quantise(weight.detach())
            linear.register_buffer(name, values, persistent=False)
            linear.register_buffer(f"{name}_scale", scale, persistent=False)
        linear.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out = _Product.apply(x.to(torch.bfloat16), self.fp8, self.fp8_scale, self.fp8_t, self.fp8_t_scale)
        return out if self.bias is None else out + self.bias


def require_hopper(device: torch.device) -> None:
    """Raises UserError where the device has no FP8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError("train.fp8 true: needs a GPU of NVIDIA's Hopper generation or newer; set train.fp8 false")


def convert_linears(layers: Iterable[nn.Module]) -> None:
    """All frozen linear layers whose sides are multiples of 16, which the FP8 product needs."""
    for layer in layers:
        for module in layer.modules():
            if (
                type(module) is nn.Linear
                and not module.weight.requires_grad
                and all(n % 16 == 0 for n in module.weight.shape)
            ):
                Fp8Linear.convert(module)
