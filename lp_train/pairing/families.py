"""What each model family's decoder layer adds to the residual stream, as one table.

A decoder layer is two branches, ``h = x + attention(x)`` and ``y = h + mlp(h)``. Families differ only in where the
norms (and dropouts) of a branch stand. To add one: a line in ``FAMILIES`` and a case in ``tests/test_families.py``;
``check_branches`` refuses a line that is wrong.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lp_train.errors import UserError


@dataclass(frozen=True)
class Family:
    """Names of a decoder layer's submodules around its ``self_attn`` and its ``mlp``; None where there is none.

    ``wrong_attention``: Transformers' attention implementations that compute something else for this family.
    ``masks_packed_rows``: whether Transformers keeps documents of a row apart by their position ids.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    attention_dropout: str | None = None
    mlp_dropout: str | None = None
    wrong_attention: tuple[str, ...] = ()
    masks_packed_rows: bool = True

    def attention_branch(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What the layer's attention adds to x [B, T, D]; kwargs: mask, rotary table, cache as the model gives."""
        out = layer.self_attn(hidden_states=_through(layer, self.before_attention, x), **kwargs)[0]
        return _through(layer, self.attention_dropout, _through(layer, self.after_attention, out))

    def mlp_branch(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What the layer's feed-forward block adds to x [B, T, D]."""
        out = layer.mlp(_through(layer, self.before_mlp, x))
        out = out[0] if isinstance(out, tuple) else out  # gpt-oss also returns its router's scores
        return _through(layer, self.mlp_dropout, _through(layer, self.after_mlp, out.view_as(x)))


def _through(layer: nn.Module, name: str | None, x: Tensor) -> Tensor:
    return x if name is None else getattr(layer, name)(x)


PRE_NORM = Family()
PRE_NORM_DROPOUT = Family(attention_dropout="resid_attn_dropout", mlp_dropout="resid_mlp_dropout")
POST_NORM = Family(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
SANDWICH_NORM = Family(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {  # by `config.model_type`
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "qwen3_moe"), PRE_NORM),
    "gpt_oss": replace(PRE_NORM, wrong_attention=("sdpa",), masks_packed_rows=False),  # sdpa has no attention sinks
    "phi3": PRE_NORM_DROPOUT,
    "olmo2": POST_NORM,
    "gemma2": replace(SANDWICH_NORM, wrong_attention=("sdpa",)),  # sdpa has no soft cap
    "gemma3_text": SANDWICH_NORM,
}


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack with ``layers``, ``norm`` and ``embed_tokens``, of a causal LM or of a PEFT model around one."""
    return model.get_decoder()


def head_dim(config: PretrainedConfig) -> int:
    """The size of an attention head, which some configurations leave to be worked out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_family(model_type: str) -> Family:
    """The family with this ``config.model_type``. Raises UserError with the supported ones otherwise."""
    if model_type not in FAMILIES:
        names = ", ".join(sorted(FAMILIES))
        raise UserError(f"model type {model_type!r}: no pairing for this family; supported: {names}")
    return FAMILIES[model_type]


class _CallSeen(Exception):
    pass


@torch.no_grad()
def check_branches(model: nn.Module, family: Family, indices: Iterable[int]) -> None:
    """Compares x + attention + mlp with the layer's own forward on random input, for each layer of ``indices``.

    Skipped for weights on the meta device. Raises UserError when a layer computes something else or
    gives NaN.
    """
    layers = decoder_of(model).layers
    if any(p.is_meta for p in model.parameters()):
        return
    kwargs = _layer_kwargs(model)
    for i in indices:
        layer, was_training = layers[i], layers[i].training
        layer.eval()
        x = _random_hidden(model)
        h = x + family.attention_branch(layer, x, kwargs)
        ours, own = h + family.mlp_branch(layer, h), layer(x, **kwargs)
        layer.train(was_training)
        if own.isnan().any():
            remedy = "check the checkpoint's weights, or set model.dtype bfloat16 or float32"
            raise UserError(f"layer {i} gives NaN; {remedy}")
        if not torch.allclose(ours.float(), own.float(), rtol=1e-2, atol=1e-3 * own.float().abs().max().item()):
            what = f"model type {model.config.model_type!r}: layer {i} ({type(layer).__name__})"
            rule = "is not attention plus mlp on the residual stream as this family's are"
            raise UserError(f"{what} {rule}; supported: {', '.join(sorted(FAMILIES))}")


def _random_hidden(model: nn.Module) -> Tensor:
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)  # its own: the user's random state stays as it is
    hidden = torch.randn(1, 4, model.config.hidden_size, generator=generator)
    return hidden.to(device=embedding.device, dtype=model.dtype)


def _layer_kwargs(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments that the model passes to its first layer, without running any layer."""
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _CallSeen

    hook = decoder_of(model).layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder_of(model)(inputs_embeds=_random_hidden(model), use_cache=False)
    except _CallSeen:
        pass
    finally:
        hook.remove()
    return seen
