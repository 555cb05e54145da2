"""Causal attention among the documents of packed rows by the flash kernel that comes with PyTorch, on GPUs.

Unlike Transformers' ``flash_attention_2`` it needs no further package. It takes no mask, so a step has none to make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

NAME = "packed_flash"  # as `attn_implementation`; no mask is registered under it, so Transformers makes none


def packed_flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, d], key and value [B, K, T, d] with K dividing H -> [B, T, H, d].

    ``cu_seq_lens_q``: int32, where each document begins in the rows one after the other, and the end.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None
    rows, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    window = {} if sliding_window is None else {"window_size_left": sliding_window - 1, "window_size_right": 0}
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    out = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, scale=scaling, **window)[0]
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(NAME, packed_flash_attention)


def supports(config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether the kernel computes this model's attention: half precision, heads of 8 to 256 values in steps of 8,
    neither soft cap nor sinks nor dropout."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    special = getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0.0)
    half = dtype in (torch.float16, torch.bfloat16)
    return half and head % 8 == 0 and head <= 256 and not special and config.model_type != "gpt_oss"
