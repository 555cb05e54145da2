"""What makes a training step fast on a GPU: compiled blocks of layers, and attention that skips what is masked."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import PretrainedConfig

from lp_train.distill import packed_attention
from lp_train.distill.replay import RunBlock, run_block

GRAPHS = 64  # of run_block: two modes, with and without gradient, times the kinds of layers; PyTorch gives up after 8


def compiles(setting: bool | Literal["auto"], device: torch.device, model_config: PretrainedConfig) -> bool:
    """Whether ``train.torch_compile`` means to compile on this device: auto does on a GPU, but no mixture of experts,
    whose shapes are others in every step."""
    mixture = any(getattr(model_config, name, None) for name in ("num_experts", "num_local_experts"))
    if setting != "auto" or device.type != "cuda" or mixture:
        return setting is True
    if not has_triton():
        warnings.warn(
            "Triton is missing, so nothing is compiled and training runs at about half of its speed; "
            "`pip install triton`, or set train.torch_compile false",
            stacklevel=2,
        )
    return has_triton()


def captures(setting: bool | Literal["auto"], compile: bool, device: torch.device, checkpointing: bool) -> bool:
    """Whether ``train.cuda_graph`` means to capture micro-batches on this device."""
    return device.type == "cuda" and (compile and not checkpointing if setting == "auto" else setting)


def training_attention(
    setting: str, model_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, compile: bool
) -> str | None:
    """The attention of training for ``model.attn_implementation``: with auto, one that skips what documents do not
    share, compiled on a GPU and eager on a CPU; None for the model's own."""
    if setting != "auto" or compile != (device.type == "cuda"):
        return None
    if packed_attention.supports(model_config, dtype, device):
        return packed_attention.NAME
    return "flex_attention" if device.type == "cuda" else None


def compiled_block(backend: str = "inductor") -> RunBlock:
    """:func:`run_block` compiled for the shapes it is called with: one graph per kind of block, not per layer."""
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it splits graphs where DDP's buckets end, but ours are no larger
    return torch.compile(run_block, dynamic=False, backend=backend)


@contextlib.contextmanager
def attention(model: nn.Module, implementation: str | None) -> Iterator[None]:
    """Inside: the model attends by another of Transformers' implementations. None leaves it alone."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = implementation or before
    try:
        yield
    finally:
        config._attn_implementation = before
