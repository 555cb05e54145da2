"""The memory of one GPU, by the rules that each function states."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from lp_train.adapters import adapted_layers
from lp_train.bench.shapes import (
    LayerShape,
    layer_shapes,
    parameters,
    suffix_blocks,
    trainable_parameters,
)
from lp_train.config import Config
from lp_train.pairing import PairPlan

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; a scale of 8 bits per 64 values, doubly quantised per 256 of those
LOGIT_BYTES = 28.0


def memory_gib(
    model_config: PretrainedConfig, plan: PairPlan, config: Config, rows: int, dtype: torch.dtype, chunk: int
) -> dict[str, float]:
    """Memory of one GPU by item, in GiB, under plain data parallelism (every GPU holds everything).

    ``rows``: rows of ``train.max_length`` tokens in one forward; ``dtype``: of the base weights, which is also that of
    the products; ``chunk``: tokens whose logits exist at once. The frozen base is held once, for teacher and student.
    Trained weights, their gradients and AdamW's two states are float32.

    Activations kept for the backward, per token, b bytes per value (:func:`activation_bytes`), for the layers from
    the first pair on; of a checkpointed block (a pair is one) its input, and the values of the largest one at a time.
    To these come three hidden states per token (the first pair's input, the last of teacher and student) and one
    gradient. Logits: 28 bytes per token of the chunk and entry of the vocabulary, measured on the loss of this project.
    """
    c, size = model_config.get_text_config(), dtype.itemsize
    tokens, trained = rows * config.train["max_length"], trainable_parameters(c, plan, config)
    weights = parameters(c) * float(size)
    if config.model.quantization == "nf4":
        weights += sum(layer.matrices for layer in layer_shapes(c)) * (NF4_BYTES - size)
    per_token = _kept_per_token(c, plan, config, size) + 4.0 * c.hidden_size * size
    items = {
        "frozen base weights": weights,
        "trained weights, float32": 4.0 * trained,
        "gradients, float32": 4.0 * trained,
        "AdamW states, float32": 8.0 * trained,
        "activations": tokens * per_token,
        "logits of a chunk": min(chunk, tokens) * c.vocab_size * LOGIT_BYTES,
    }
    return {name: value / GIB for name, value in items.items()}


def _kept_per_token(c: PretrainedConfig, plan: PairPlan, config: Config, size: int) -> float:
    layers = layer_shapes(c)
    adapted = adapted_layers(plan, config) if config.tune == "lora" else plan.layers
    length = config.train["max_length"] if config.model.attn_implementation == "eager" else 0
    kept, largest = 0.0, 0.0
    for block, checkpointed in suffix_blocks(plan, config):
        values = sum(activation_bytes(layers[i], c.hidden_size, size, i in adapted, length) for i in block)
        kept += c.hidden_size * size if checkpointed else values
        largest = max(largest, values if checkpointed else 0.0)
    return kept + largest


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
