"""FlashAttention 4 among the documents of packed rows, where its package is installed: on an H200 faster than
PyTorch's kernel for heads of 128. As operators of PyTorch, so that compiled blocks and CUDA graphs take them.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 128  # with 64 its backward is slower than PyTorch's on an H200, others were not measured


@cache
def kernels() -> Any:
    """The package's module, or None where it is not installed."""
    found = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    return importlib.import_module("flash_attn.cute.interface") if found else None


@torch.compiler.assume_constant_result
def _usable() -> bool:
    return kernels() is not None and torch.cuda.get_device_capability()[0] == 9


def faster_here(q: Tensor) -> bool:
    """q [N, H, d]: whether it is what was measured to be faster: Hopper, half precision, heads of 128."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == HEAD_DIM and _usable()


def _arguments(starts: Tensor, longest: int, scale: float) -> dict[str, Any]:
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return {**lengths, "softmax_scale": scale, "causal": True}


@torch.library.custom_op("lp_train::flash4", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal: q [N, H, d], k and v [N, K, d], ``starts`` int32 of the documents in N -> [N, H, d] and, for the
    gradient, float32 logarithms of sums [H, N]."""
    out, sums, *_ = kernels()._flash_attn_fwd(q, k, v, **_arguments(starts, longest, scale), return_lse=True)
    return out, sums


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Any:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


_TENSORS = ", ".join(f"Tensor {name}" for name in ("grad", "q", "k", "v", "out", "sums", "starts"))
_BACKWARD = f"({_TENSORS}, int longest, float scale) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("lp_train::flash4_backward", mutates_args=(), schema=_BACKWARD)
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *starts_longest_and_scale: Any
) -> Any:
    return kernels()._flash_attn_bwd(q, k, v, out, grad, sums, **_arguments(*starts_longest_and_scale))[:3]


@_gradients.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, *ctx.longest_and_scale = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(grad.contiguous(), *ctx.saved_tensors, *ctx.longest_and_scale), None, None, None


attend.register_autograd(_backward, setup_context=_save)
