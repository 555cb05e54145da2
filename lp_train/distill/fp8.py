"""Products with frozen weights in FP8 on Hopper and newer GPUs: e4m3 values, one scale per row of each factor.

In training the original multiplies in FP8 too, below the first pair and as the teacher: it is the exact original only
in eval mode, where all figures of a report come from. With an exact teacher the student alone would gain, 34 of the
66 passes through a layer of an 8B step: 1.29 times as fast at most. What it costs in recovered KL stands in
``recipes/benchmarks/README.md``.
"""

from collections.abc import Iterable, Iterator
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


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """x [..., K] times an e4m3 weight [M, K] with scales [M, 1] -> bf16 [..., M]."""
    values, scale = quantise(x.flatten(0, -2))
    scales = {"scale_a": scale, "scale_b": weight_scale.t()}
    out = torch._scaled_mm(values, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    return out.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, *by_columns: Tensor) -> Tensor:
        ctx.save_for_backward(*by_columns)
        return _product(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _product(grad, *ctx.saved_tensors), None, None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer that multiplies in FP8 in training mode; in eval mode it is bitwise the one it was."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out = _Product.apply(x.to(torch.bfloat16), self.fp8, self.fp8_scale, self.fp8_t, self.fp8_t_scale)
        return out if self.bias is None else out + self.bias


def require_hopper(device: torch.device) -> None:
    """Raises UserError where the device has no FP8 products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError("train.fp8 true: needs a GPU of NVIDIA's Hopper generation or newer; set train.fp8 false")


def convertible(layers: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """The frozen bf16 linear layers whose sides are multiples of 16, which the FP8 product needs."""
    for module in (module for layer in layers for module in layer.modules()):
        frozen = type(module) is nn.Linear and not module.weight.requires_grad
        if frozen and module.weight.dtype == torch.bfloat16 and all(n % 16 == 0 for n in module.weight.shape):
            yield module


def convert_linears(layers: Iterable[nn.Module]) -> None:
    """Makes those FP8 layers in place; two FP8 copies of the weight, by rows and by columns, are kept beside it.

    Raises:
        UserError: there are none, as in a model with 4-bit weights.
    """
    found = list(convertible(layers))
    if not found:
        raise UserError("train.fp8 true: the model has no frozen bf16 projections; set train.fp8 false")
    for linear in found:
        for name, weight in (("fp8", linear.weight), ("fp8_t", linear.weight.t().contiguous())):
            values, scale = quantise(weight.detach())
            linear.register_buffer(name, values, persistent=False)
            linear.register_buffer(f"{name}_scale", scale, persistent=False)
        linear.__class__ = Fp8Linear
