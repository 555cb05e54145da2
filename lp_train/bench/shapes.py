"""Decoder layers in numbers, read off a paired model with its adapters; one without memory (meta) will do."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lp_train.adapters import attach
from lp_train.config import Config
from lp_train.errors import UserError, one_line
from lp_train.models import attention_of
from lp_train.pairing import PairPlan, decoder_of, pair_layers


def build_on_meta(model_config: PretrainedConfig, plan: PairPlan, config: Config, dtype: torch.dtype) -> nn.Module:
    """The paired model with what is trained in it, as shapes without memory."""
    attention = attention_of(config.model, model_config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=attention)
            return attach(pair_layers(model, plan, config.plan.algebra), plan, config)
    except (ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = one_line(error)[:160]
        raise UserError(f"model.attn_implementation {attention!r}: not for this model ({reason}); use eager") from error


class Linear(NamedTuple):
    """A projection, and the rank of its adapter; 0 without one."""

    inputs: int
    outputs: int
    rank: int


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. ``linears``: its projections by name, in the order they run. ``active``: the weights of router
    and chosen experts that a token is multiplied with. ``inner``: values between the MLP's two projections, per token.
    """

    linears: dict[str, Linear]
    active: int
    inner: int
    norms: int
    window: int | None

    @property
    def matrices(self) -> int:
        return sum(a * b for a, b, _ in self.linears.values())

    @property
    def queries(self) -> int:
        return self.linears["self_attn.o_proj"].inputs

    @property
    def keys(self) -> int:
        *inputs, _ = [linear.outputs for name, linear in self.linears.items() if name.startswith("self_attn.")]
        return (sum(inputs) - self.queries) // 2


def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """The shapes of all decoder layers of a model of one of the supported families."""
    c = model.config.get_text_config()
    return [_layer_shape(layer, c, i) for i, layer in enumerate(decoder_of(model).layers)]


def _layer_shape(layer: nn.Module, c: Any, index: int) -> LayerShape:
    linears = _linears(layer, "self_attn", last="o_proj") | _linears(layer, "mlp", last="down_proj")
    norms = sum(name.endswith("layernorm") for name, _ in layer.named_children())
    kinds = getattr(c, "layer_types", None)
    window = None if kinds and kinds[index] != "sliding_attention" else getattr(c, "sliding_window", None)
    if down := linears.get("mlp.down_proj"):
        active, inner = 0, down.inputs
    else:
        matrices = [p[0].numel() for p in layer.mlp.experts.parameters() if p.ndim == 3]  # of one expert
        routers = [p.numel() for name, p in layer.mlp.named_parameters() if name.endswith(".weight")]
        active = c.num_experts_per_tok * sum(matrices) + sum(routers)
        inner = c.num_experts_per_tok * layer.mlp.experts.down_proj[0].numel() // c.hidden_size
    return LayerShape(linears, active, inner, norms, window)


def _linears(layer: nn.Module, block: str, last: str) -> dict[str, Linear]:
    found = {}
    for name, module in sorted(getattr(layer, block).named_children(), key=lambda child: child[0] == last):
        rank = sum(module.r.values()) if isinstance(module, LoraLayer) else 0
        base = getattr(module, "base_layer", getattr(module, "original_module", module))  # of PEFT's wrappers
        if isinstance(base, nn.Linear):
            found[f"{block}.{name}"] = Linear(base.in_features, base.out_features, rank)
    return found


def checkpoint_every(config: Config) -> int:
    """``train.gradient_checkpointing_every``; 0 without checkpointing."""
    return config.train["gradient_checkpointing_every"] if config.train["gradient_checkpointing"] else 0


def suffix_blocks(plan: PairPlan, every: int) -> list[tuple[tuple[int, ...], bool]]:
    """The layers that run from the first pair on in blocks, a pair being one, and whether the block is checkpointed:
    blocks 0, ``every``, twice that and so on, counted from the first pair; none for 0."""
    blocks = plan.blocks
    if plan.kind != "pair":
        blocks = [(i,) for block in blocks for i in block if i not in plan.removed]
    return [(block, every > 0 and n % every == 0) for n, block in enumerate(blocks)]
