"""Decoder layers in numbers, from a Transformers config, a plan and a Config. Exact for the families of
``lp_train.pairing``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from lp_train.adapters import adapted_layers, selects
from lp_train.config import Config
from lp_train.pairing import FAMILIES, PairPlan


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer in numbers. ``linears``: its nn.Linear modules by name, (in, out), in the order they run.

    ``other``: parameters beside those matrices. ``active``: how many of them are weights that a token is multiplied
    with (router and chosen experts). ``inner``: values between the two projections of the MLP, per token.
    """

    linears: dict[str, tuple[int, int]]
    other: int
    active: int
    inner: int
    heads: int
    queries: int
    keys: int
    norms: int
    window: int | None

    @property
    def matrices(self) -> int:
        return sum(a * b for a, b in self.linears.values())


def layer_shape(model_config: PretrainedConfig, index: int) -> LayerShape:
    """The shape of decoder layer ``index`` of one of the supported families."""
    c = model_config.get_text_config()
    kind, d, heads = c.model_type, c.hidden_size, c.num_attention_heads
    head = getattr(c, "head_dim", None) or d // heads
    q, k = heads * head, (getattr(c, "num_key_value_heads", None) or heads) * head
    sparse = _is_sparse(c, index)
    linears = _attention(kind, d, q, k) | ({} if sparse else _mlp(kind, d, c.intermediate_size))
    family = FAMILIES[kind]
    norms = [family.before_attention, family.after_attention, family.before_mlp, family.after_mlp]
    block_norms = sum(name is not None for name in norms)
    head_norms = {"qwen3": 2 * head, "qwen3_moe": 2 * head, "gemma3_text": 2 * head, "olmo2": q + k}.get(kind, 0)
    other, active, inner = _experts(c) if sparse else (0, 0, c.intermediate_size)
    other += _biases(c, linears) + block_norms * d + head_norms + (heads if kind == "gpt_oss" else 0)  # its sinks
    return LayerShape(linears, other, active, inner, heads, q, k, block_norms, _window(c, index))


def layer_shapes(model_config: PretrainedConfig) -> list[LayerShape]:
    """The shapes of all decoder layers."""
    return [layer_shape(model_config, i) for i in range(model_config.get_text_config().num_hidden_layers)]


def _attention(kind: str, d: int, q: int, k: int) -> dict[str, tuple[int, int]]:
    qkv = {"qkv_proj": (d, q + 2 * k)} if kind == "phi3" else {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k)}
    return {f"self_attn.{name}": shape for name, shape in {**qkv, "o_proj": (q, d)}.items()}


def _mlp(kind: str, d: int, f: int) -> dict[str, tuple[int, int]]:
    up = {"gate_up_proj": (d, 2 * f)} if kind == "phi3" else {"gate_proj": (d, f), "up_proj": (d, f)}
    return {f"mlp.{name}": shape for name, shape in {**up, "down_proj": (f, d)}.items()}


def _biases(c: Any, linears: dict[str, tuple[int, int]]) -> int:
    attention, mlp = getattr(c, "attention_bias", False), getattr(c, "mlp_bias", False)
    with_bias = [n for n in linears if (attention if n.startswith("self_attn") else mlp)]
    if c.model_type == "qwen2":
        with_bias = [f"self_attn.{n}_proj" for n in "qkv"]
    return sum(linears[n][1] for n in with_bias)


def _is_sparse(c: Any, index: int) -> bool:
    if c.model_type == "qwen3_moe":
        return index not in c.mlp_only_layers and c.num_experts > 0 and (index + 1) % c.decoder_sparse_step == 0
    return c.model_type == "gpt_oss"


def _experts(c: Any) -> tuple[int, int, int]:
    """(parameters of router and experts, those a token is multiplied with, inner values per token)."""
    d, chosen = c.hidden_size, c.num_experts_per_tok
    if c.model_type == "gpt_oss":
        experts, f = c.num_local_experts, c.intermediate_size
        biases = experts + experts * (2 * f + d)
    else:
        experts, f, biases = c.num_experts, c.moe_intermediate_size, 0
    return experts * d + experts * 3 * d * f + biases, experts * d + chosen * 3 * d * f, chosen * f


def _window(c: Any, index: int) -> int | None:
    kinds = getattr(c, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return getattr(c, "sliding_window", None)


def parameters(model_config: PretrainedConfig) -> int:
    """All parameters of the causal LM; a tied head counts once."""
    c = model_config.get_text_config()
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return tables + c.hidden_size + sum(layer.matrices + layer.other for layer in layer_shapes(c))


def adapted_projections(model_config: PretrainedConfig, plan: PairPlan, config: Config) -> dict[int, list[str]]:
    """By layer, the names of the projections that get an adapter; none with ``tune: full``."""
    c, targets = model_config.get_text_config(), config.lora["target_modules"]
    mixture = any(_is_sparse(c, i) for i in range(plan.num_layers))  # whose dense MLPs are left alone
    layers = adapted_layers(plan, config) if config.tune == "lora" else ()
    names = {i: [n for n in layer_shape(c, i).linears if not (mixture and n.startswith("mlp."))] for i in layers}
    return {i: [n for n in names[i] if selects(targets, f"model.layers.{i}.{n}")] for i in layers}


def trainable_parameters(model_config: PretrainedConfig, plan: PairPlan, config: Config) -> int:
    """What is trained: with LoRA r (in + out) for each adapted projection, with ``tune: full`` the paired layers.

    DoRA and ``lora_bias`` add ``out`` each. ``rank_pattern`` and ``modules_to_save`` are not looked at.
    """
    layers, lora = layer_shapes(model_config), config.lora
    if config.tune == "full":
        return sum(layers[i].matrices + layers[i].other for i in plan.layers)
    vectors = bool(lora.get("use_dora")) + bool(lora.get("lora_bias"))
    adapted = adapted_projections(model_config, plan, config)
    shapes = [layers[i].linears[name] for i, names in adapted.items() for name in names]
    return sum(lora["r"] * (a + b) + vectors * b for a, b in shapes)


def suffix_blocks(plan: PairPlan, config: Config) -> list[tuple[tuple[int, ...], bool]]:
    """The layers from the first pair on in blocks, a pair being one, and whether the block is checkpointed.

    ``train.gradient_checkpointing_every: n`` checkpoints blocks 0, n, 2n, ... counted from the first pair.
    """
    every = config.train.get("gradient_checkpointing_every", 1) if config.train["gradient_checkpointing"] else 0
    return [(block, every > 0 and n % every == 0) for n, block in enumerate(plan.blocks)]
