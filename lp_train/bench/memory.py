"""The memory of one GPU, by the rules that each function states."""

from torch import nn

from lp_train.adapters import count_parameters
from lp_train.bench.shapes import LayerShape, checkpoint_every, layer_shapes, suffix_blocks
from lp_train.config import Config
from lp_train.distill.compiled import Engine
from lp_train.distill.fp8 import convertible
from lp_train.distill.losses import ROWS_PER_CHUNK
from lp_train.pairing import decoder_of, plan_of

GIB = 2**30
# Of the values that a block keeps uncompiled; compiled, its kernels compute the others again.
COMPILED = 0.7
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits; a scale of 8 bits per 64 values, doubly quantised per 256 of those


def memory_gib(model: nn.Module, config: Config, engine: Engine, rows: int) -> dict[str, float]:
    """Of a paired model with its adapters and ``rows`` rows in one forward: memory of one GPU by item, in GiB, under
    plain data parallelism (every GPU holds everything).

    The frozen base is held once, for teacher and student. Activations are :func:`activation_bytes` of the layers from
    the first pair on, :data:`COMPILED` of them where blocks are compiled (Llama keeps 0.69, Phi-3 0.75, Gemma 2 less);
    of a checkpointed block its input, and the values of the largest one at a time. To these come three hidden states
    per token (the first pair's input, the last of teacher and student) and one gradient.
    """
    c, size = model.config.get_text_config(), model.dtype.itemsize
    trained, everything = count_parameters(model)
    base = everything if config.tune == "full" else everything - trained
    weights, tokens = float(base * size), rows * config.train["max_length"]
    if config.model.quantization == "nf4":
        weights += sum(layer.matrices for layer in layer_shapes(model)) * (NF4_BYTES - size)
    items = {
        "frozen base weights": weights,
        **({"FP8 copies of them": fp8_bytes(model)} if config.train["fp8"] else {}),
        "trained weights, float32": 4.0 * trained,
        "gradients, float32": 4.0 * trained,
        "AdamW states, float32": 8.0 * trained,
        "activations": tokens * (_kept_per_token(model, config, engine, size) + 4.0 * c.hidden_size * size),
        "logits of a chunk": min(ROWS_PER_CHUNK, tokens) * c.vocab_size * logit_bytes(config, engine, size),
    }
    return {name: value / GIB for name, value in items.items()}


def fp8_bytes(model: nn.Module) -> float:
    """Two copies of each frozen projection, by rows and by columns, with a float32 scale for each of these."""
    return float(sum(2 * m.weight.numel() + 4 * sum(m.weight.shape) for m in convertible(decoder_of(model).layers)))


def logit_bytes(config: Config, engine: Engine, size: int) -> float:
    """Bytes per token of the chunk and entry of the vocabulary, measured on the loss of this project: compiled on bf16
    (recipes/benchmarks/results/loss_h200.json), or one operation after the other."""
    forward = config.loss.beta == 0 or not config.loss.kd
    compiled, eager = (3.5 * size, 24.0) if forward else (5.5 * size, 44.0)
    return compiled if engine.compile_loss else eager


def _kept_per_token(model: nn.Module, config: Config, engine: Engine, size: int) -> float:
    c, layers, (plan, _) = model.config.get_text_config(), layer_shapes(model), plan_of(model)
    eager = (engine.attention or c._attn_implementation) == "eager"
    scores = 8.0 * c.num_attention_heads * config.train["max_length"] if eager else 0.0
    full = plan.layers if config.tune == "full" else ()
    kept, largest, share = 0.0, 0.0, COMPILED if engine.compile_blocks else 1.0
    for block, checkpointed in suffix_blocks(plan, checkpoint_every(config)):
        values = sum(share * activation_bytes(layers[i], c.hidden_size, size, i in full) + scores for i in block)
        kept += c.hidden_size * size if checkpointed else values
        largest = max(largest, values if checkpointed else 0.0)
    return kept + largest


def activation_bytes(layer: LayerShape, width: int, size: int, trained: bool = False) -> float:
    """Bytes that one layer keeps for its backward, per token, in values of ``size`` bytes; eager attention's scores not
    counted, which take 8 bytes per head and position of the row.

    Frozen: 3 inner values of the MLP, 2 each of queries and keys (queries, output, keys, values), and the input of
    each norm in float32. With adapters, or ``trained`` itself, also the inputs of the projections: one inner value,
    the attention's output, and five of the layer's width.
    """
    values = 3 * layer.inner + 2 * (layer.queries + layer.keys)
    if trained or any(linear.rank for linear in layer.linears.values()):
        values += layer.inner + layer.queries + 5 * width
    return values * size + layer.norms * width * 4.0
