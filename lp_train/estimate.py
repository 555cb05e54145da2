"""What a run costs, before it runs: parameters, FLOPs and memory from a Transformers config, a plan and a Config.

Arithmetic on shapes only; no model is built. Exact for parameters of the families of ``lp_train.pairing``; for FLOPs
and memory by the rules that each function states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from lp_train.adapters import _selects
from lp_train.config import Config
from lp_train.pairing import FAMILIES, PairPlan

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; a scale of 8 bits per 64 values, doubly quantised per 256 of those

PEAK_FLOPS = {  # dense bf16 tensor-core FLOPs per second, from NVIDIA's data sheets; the first name that matches counts
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The GPU's peak in bf16 FLOPs per second, for MFU; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer in numbers. ``linears``: its nn.Linear modules by name, (in, out).

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


def _layers(model_config: PretrainedConfig, plan: PairPlan) -> list[LayerShape]:
    return [layer_shape(model_config, i) for i in range(plan.num_layers)]


def _embedding(model_config: PretrainedConfig) -> int:
    c = model_config.get_text_config()
    return c.vocab_size * c.hidden_size


def parameters(model_config: PretrainedConfig) -> int:
    """All parameters of the causal LM; a tied head counts once."""
    c = model_config.get_text_config()
    layers = [layer_shape(c, i) for i in range(c.num_hidden_layers)]
    tables = _embedding(c) * (1 if c.tie_word_embeddings else 2)
    return tables + c.hidden_size + sum(layer.matrices + layer.other for layer in layers)


def adapted_layers(plan: PairPlan, config: Config) -> range | tuple[int, ...]:
    """The layers that get adapters: the paired ones, or all from the first pair on (``lora.scope: suffix``)."""
    return plan.layers if config.lora["scope"] == "paired" else range(plan.first_layer, plan.num_layers)


def trainable_parameters(model_config: PretrainedConfig, plan: PairPlan, config: Config) -> int:
    """What is trained: with LoRA r (in + out) for each adapted projection, with ``tune: full`` the paired layers.

    DoRA and ``lora_bias`` add ``out`` each. ``rank_pattern`` is not looked at.
    """
    if config.tune == "full":
        shapes = [layer_shape(model_config, i) for i in plan.layers]
        return sum(shape.matrices + shape.other for shape in shapes)
    lora = config.lora
    vectors = bool(lora.get("use_dora")) + bool(lora.get("lora_bias"))
    total = 0
    for i in adapted_layers(plan, config):
        for name, (a, b) in layer_shape(model_config, i).linears.items():
            if _selects(lora["target_modules"], f"model.layers.{i}.{name}"):
                total += lora["r"] * (a + b) + vectors * b
    return total


def mean_context(length: int, window: int | None) -> float:
    """Positions that a token attends to, averaged over a row of ``length`` tokens of one document."""
    w = min(length, window or length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def train_flops_per_token(model_config: PretrainedConfig, plan: PairPlan, config: Config, max_length: int) -> float:
    """FLOPs of teacher and student per token of a packed row, one multiply-add counted as two.

    For layer i let L_i = 2 x (its matrices' entries that a token is multiplied with) and
    A_i = 4 x heads x head_dim x (mean number of positions attended) be the forward FLOPs of one token, H = 2 x hidden
    x vocabulary the head's, P the adapters' parameters, and f the first paired layer. Then

        below f, once, no gradient:   sum over i < f of (L_i + A_i)
        teacher forward:              sum over i >= f of (L_i + A_i) + H (no H without loss.kd)
        student forward:              sum over i >= f of (L_i + A_i) + 2 P + H
        student backward:             sum over i >= f of (L_i + 2 A_i) + 4 P + H

    The base weights are frozen, so the backward is one product per matrix, not two; ``tune: full`` has the second one
    (L_i for the paired layers) in place of P's terms. Gradient checkpointing adds a student forward without H.
    An upper bound: rows hold several documents, which attend to themselves only, and the head runs on trained tokens.
    """
    layers, first = _layers(model_config, plan), plan.first_layer
    linear = [2.0 * (layer.matrices + layer.active) for layer in layers]
    attention = [4.0 * layer.queries * mean_context(max_length, layer.window) for layer in layers]
    head = 2.0 * _embedding(model_config)
    adapters = 0 if config.tune == "full" else trainable_parameters(model_config, plan, config)
    below = sum(linear[:first]) + sum(attention[:first])
    above = sum(linear[first:]) + sum(attention[first:])
    teacher = above + (head if config.loss.kd else 0.0)
    forward = above + 2 * adapters
    backward = sum(linear[first:]) + 2 * sum(attention[first:]) + 4 * adapters + head
    if config.tune == "full":
        backward += sum(linear[i] for i in plan.layers)
    again = forward if config.train["gradient_checkpointing"] else 0.0
    return below + teacher + forward + head + backward + again


def memory_gib(
    model_config: PretrainedConfig, plan: PairPlan, config: Config, rows: int, dtype: torch.dtype, chunk: int
) -> dict[str, float]:
    """Memory of one GPU by item, in GiB, under plain data parallelism (every GPU holds everything).

    ``rows``: rows of ``train.max_length`` tokens in one forward; ``dtype``: of the base weights, which is also that of
    the products; ``chunk``: tokens whose logits exist at once. The frozen base is held once, for teacher and student.
    Trained weights, their gradients and AdamW's two states are float32.

    Activations kept for the backward, per token, b bytes per value (:func:`activation_bytes`), for the layers from
    the first pair on; with gradient checkpointing one input per layer and the values of one pair. To these come
    three hidden states per token (the first pair's input, the last of teacher and student) and one gradient.
    Logits: 28 bytes per token of the chunk and entry of the vocabulary, measured on the loss of this project.
    """
    length, size = config.train["max_length"], dtype.itemsize
    tokens, trained = rows * length, trainable_parameters(model_config, plan, config)
    layers = _layers(model_config, plan)
    weights = parameters(model_config) * float(size)
    if config.model.quantization == "nf4":
        weights += sum(layer.matrices for layer in layers) * (NF4_BYTES - size)
    adapted = adapted_layers(plan, config) if config.tune == "lora" else plan.layers
    eager = config.model.attn_implementation == "eager"
    kept = {
        i: activation_bytes(layers[i], _width(model_config), size, i in adapted, length if eager else 0)
        for i in range(plan.first_layer, plan.num_layers)
    }
    per_token = sum(kept.values())
    if config.train["gradient_checkpointing"]:
        per_token = len(kept) * _width(model_config) * size + max(kept[a] + kept[b] for a, b in plan.pairs)
    vocabulary = _embedding(model_config) // _width(model_config)
    items = {
        "frozen base weights": weights,
        "trained weights, float32": 4.0 * trained,
        "gradients, float32": 4.0 * trained,
        "AdamW states, float32": 8.0 * trained,
        "activations": tokens * (per_token + 4.0 * _width(model_config) * size),
        "logits of a chunk": min(chunk, tokens) * vocabulary * LOGIT_BYTES,
    }
    return {name: value / GIB for name, value in items.items()}


LOGIT_BYTES = 28.0


def activation_bytes(layer: LayerShape, width: int, size: int, trained: bool, eager_length: int = 0) -> float:
    """Bytes that one layer keeps for its backward, per token, in values of ``size`` bytes.

    Frozen: 3 inner values of the MLP, 2 each of queries and keys (queries, output, keys, values), and the input of
    each norm in float32. With adapters or own gradients also the inputs of the projections: one inner value, the
    attention's output, and five of the layer's width. ``eager_length``: row length with eager attention, whose scores
    take 8 bytes per head and position.
    """
    values = 3 * layer.inner + 2 * (layer.queries + layer.keys)
    if trained:
        values += layer.inner + layer.queries + 5 * width
    return values * size + layer.norms * width * 4.0 + 8.0 * layer.heads * eager_length


def _width(model_config: PretrainedConfig) -> int:
    return model_config.get_text_config().hidden_size
