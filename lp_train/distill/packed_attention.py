"""Causal attention among the documents of packed rows without a mask, so that nothing is computed to be thrown away.

On GPUs by FlashAttention 4 where it is installed, else by the flash kernel in PyTorch; on CPUs by document.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from lp_train.distill import flash4
from lp_train.pairing.families import head_dim

NAME = "packed"  # as `attn_implementation`; no mask is registered under it, so Transformers makes none
LONG = 1024  # tokens of a document from which on a CPU does not hold all of its scores


def packed_attention(
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
    rows, _, length, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if sliding_window is None and flash4.faster_here(q):
        out = flash4.attend(q, k, v, cu_seq_lens_q, max_length_q, scale)[0]
    elif has_kernel(query):
        window = {} if sliding_window is None else {"window_size_left": sliding_window - 1, "window_size_right": 0}
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, scale=scale, **window)[0]
    else:
        queries, keys, values = (x.split(cu_seq_lens_q.diff().tolist()) for x in (q, k, v))
        documents = zip(queries, keys, values, strict=True)
        out = torch.cat([_document(*document, scale, sliding_window) for document in documents])
    return out.unflatten(0, (rows, length)), None


def has_kernel(query: Tensor) -> bool:
    return query.is_cuda


def _document(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [L, H, d], k and v [L, K, d] -> [L, H, d]. In bfloat16 and for L of some hundred, products and a softmax are
    three times as fast as PyTorch's kernel, forward and backward."""
    length, heads, size = q.shape
    groups = k.shape[1]
    if length >= LONG and window is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)
    unseen = torch.full((length, length), -torch.inf, dtype=q.dtype)
    unseen = unseen.triu(1) if window is None else unseen.triu(1) + unseen.tril(-window)
    queries = (q * scale).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).reshape(groups, -1, size)
    scores = (queries @ k.permute(1, 2, 0)).view(groups, -1, length, length)
    weights = (scores + unseen).softmax(-1)
    return (weights.view(groups, -1, length) @ v.transpose(0, 1)).view(heads, length, size).transpose(0, 1)


AttentionInterface.register(NAME, packed_attention)


def supports(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this computes the model's attention, and faster: neither soft cap nor sinks; on a GPU half precision and
    heads of 8 to 256 values in steps of 8, on a CPU bfloat16."""
    head, half = head_dim(config), dtype in (torch.float16, torch.bfloat16)
    fits = dtype == torch.bfloat16 if device.type == "cpu" else half and head % 8 == 0 and head <= 256
    return fits and not getattr(config, "attn_logit_softcapping", None) and config.model_type != "gpt_oss"
