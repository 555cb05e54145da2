"""A decoder with and without layer pairs, written from the equations on raw weights in float64.

Independent on purpose: plain torch, nothing of transformers and nothing of lp_train. A model family is an ``Arch``: a
few numbers and two functions. Shapes: B rows, T tokens, D model width, H heads, d head width, E experts.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Arch:
    """A family's equations. ``windows`` and ``thetas`` have one entry per layer, ``norms`` one name per place."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # keys that a query sees, itself included; None: all before it
    thetas: tuple[float | None, ...]  # rotary base; None: no rotary embedding in this layer (NoPE)
    project: Callable[["Arch", Weights, Tensor], tuple[Tensor, Tensor, Tensor]]
    feed_forward: Callable[["Arch", Weights, Tensor], Tensor]
    # before attention, after attention, before MLP, after MLP
    norms: tuple[str | None, str | None, str | None, str | None]
    scale: float  # of the attention scores
    eps: float = 1e-6
    gain_offset: float = 0.0  # a norm multiplies by gain_offset + weight
    activation: Callable[[Tensor], Tensor] = F.silu
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    top_k: int = 0
    normalise_top_k: bool = False


def rms_norm(arch: Arch, gain: Tensor, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + arch.eps) * (arch.gain_offset + gain)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def cap(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else limit * torch.tanh(x / limit)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [B, T, H, d]: component j turns with component j + d/2."""
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * speeds
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def visible(tokens: int, window: int | None) -> Tensor:
    """[T, T]: may query t (row) see key s (column)."""
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (behind >= 0) & (behind < (tokens if window is None else window))


def attention(arch: Arch, w: Weights, x: Tensor, window: int | None, theta: float | None) -> Tensor:
    q, k, v = (part.unflatten(-1, (-1, arch.head_dim)) for part in arch.project(arch, w, x))
    if theta is not None:
        q, k = rotate(q, theta), rotate(k, theta)
    k, v = (part.repeat_interleave(arch.heads // arch.kv_heads, dim=2) for part in (k, v))
    scores = cap(torch.einsum("bthd,bshd->bhts", q, k) * arch.scale, arch.attention_cap)
    scores = scores.masked_fill(~visible(x.shape[1], window), -math.inf)
    if "self_attn.sinks" in w:  # one more score per head, that takes probability and gives nothing
        sinks = w["self_attn.sinks"][None, :, None, None].expand(len(x), -1, x.shape[1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : x.shape[1]]
    return linear(w, "self_attn.o_proj", torch.einsum("bhts,bshd->bthd", shares, v).flatten(2))


# --- how a family makes q, k and v: [B, T, D] -> three of [B, T, heads * d]


def separate(arch: Arch, w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (linear(w, f"self_attn.{name}_proj", x) for name in "qkv")
    return q, k, v


def packed(arch: Arch, w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    widths = [arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim, arch.kv_heads * arch.head_dim]
    q, k, v = linear(w, "self_attn.qkv_proj", x).split(widths, dim=-1)
    return q, k, v


def normed_per_head(arch: Arch, w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = separate(arch, w, x)
    q, k = (part.unflatten(-1, (-1, arch.head_dim)) for part in (q, k))
    q, k = rms_norm(arch, w["self_attn.q_norm.weight"], q), rms_norm(arch, w["self_attn.k_norm.weight"], k)
    return q.flatten(2), k.flatten(2), v


def normed_whole(arch: Arch, w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = separate(arch, w, x)
    return rms_norm(arch, w["self_attn.q_norm.weight"], q), rms_norm(arch, w["self_attn.k_norm.weight"], k), v


# --- feed-forward blocks: [B, T, D] -> [B, T, D]


def gated(arch: Arch, w: Weights, x: Tensor) -> Tensor:
    inner = arch.activation(linear(w, "mlp.gate_proj", x)) * linear(w, "mlp.up_proj", x)
    return linear(w, "mlp.down_proj", inner)


def gated_packed(arch: Arch, w: Weights, x: Tensor) -> Tensor:
    gate, up = linear(w, "mlp.gate_up_proj", x).chunk(2, dim=-1)
    return linear(w, "mlp.down_proj", arch.activation(gate) * up)


def experts_after_softmax(arch: Arch, w: Weights, x: Tensor) -> Tensor:
    """Qwen3-MoE: softmax over all experts, then the best k of them; a layer without a router is an ordinary MLP."""
    if "mlp.gate.weight" not in w:
        return gated(arch, w, x)
    shares, chosen = linear(w, "mlp.gate", x).softmax(-1).topk(arch.top_k, dim=-1)
    if arch.normalise_top_k:
        shares = shares / shares.sum(-1, keepdim=True)
    gate, up = torch.einsum("btd,efd->btef", x, w["mlp.experts.gate_up_proj"]).chunk(2, dim=-1)
    outputs = torch.einsum("btef,edf->bted", arch.activation(gate) * up, w["mlp.experts.down_proj"])
    return _mix(outputs, shares, chosen)


def experts_before_softmax(arch: Arch, w: Weights, x: Tensor) -> Tensor:
    """gpt-oss: softmax over the best k experts only; gate and up interleaved, clamped at 7, biases everywhere."""
    best, chosen = linear(w, "mlp.router", x).topk(arch.top_k, dim=-1)
    inner = torch.einsum("btd,edf->btef", x, w["mlp.experts.gate_up_proj"]) + w["mlp.experts.gate_up_proj_bias"]
    gate, up = inner[..., 0::2].clamp(max=7.0), inner[..., 1::2].clamp(min=-7.0, max=7.0)
    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    outputs = torch.einsum("btef,efd->bted", inner, w["mlp.experts.down_proj"]) + w["mlp.experts.down_proj_bias"]
    return _mix(outputs, best.softmax(-1), chosen)


def _mix(outputs: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
    """Sum of the chosen experts' outputs [B, T, E, D] with shares [B, T, k] of the experts chosen [B, T, k]."""
    weights = torch.zeros(outputs.shape[:-1], dtype=outputs.dtype).scatter(-1, chosen, shares)
    return torch.einsum("bted,bte->btd", outputs, weights)


# --- the whole model


def logits(arch: Arch, state: Weights, ids: Tensor, pairs: Iterable[Pair] = (), algebra: str = "lp") -> Tensor:
    """Logits [B, T, V] for ids [B, T]; ``pairs`` are run side by side (design: arXiv 2502.02790, both algebras)."""
    state = {name: tensor.double() for name, tensor in state.items()}
    layers = [_layer(state, i) for i in range(len(arch.windows))]

    def norm(i: int, place: int, x: Tensor) -> Tensor:
        name = arch.norms[place]
        return x if name is None else rms_norm(arch, layers[i][f"{name}.weight"], x)

    def a(i: int, x: Tensor) -> Tensor:
        return norm(i, 1, attention(arch, layers[i], norm(i, 0, x), arch.windows[i], arch.thetas[i]))

    def f(i: int, x: Tensor) -> Tensor:
        return norm(i, 3, arch.feed_forward(arch, layers[i], norm(i, 2, x)))

    x, i, partner = state["model.embed_tokens.weight"][ids] * arch.embedding_scale, 0, dict(pairs)
    while i < len(layers):
        j = partner.get(i)
        if j is None:
            h = x + a(i, x)
            x = h + f(i, h)
        elif algebra == "lp":
            h = x + a(i, x) + a(j, x)
            x = h + f(i, h) + f(j, h)
        else:
            h1, h2 = x + a(i, x), x + a(j, x)
            x = h1 + f(i, h1) + (h2 - x) + f(j, h2)
        i = i + 1 if j is None else j + 1
    return cap(linear(state, "lm_head", rms_norm(arch, state["model.norm.weight"], x)), arch.logit_cap)


def _layer(state: Weights, i: int) -> Weights:
    prefix = f"model.layers.{i}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
