"""What one GPU of many holds and sends, by the rules that each function states: whole weights on each, or shards."""

from torch import nn

from lp_train.adapters import count_parameters
from lp_train.bench.memory import GIB, memory_gib
from lp_train.config import Config
from lp_train.distill.compiled import Engine
from lp_train.pairing import decoder_of, plan_of

ENGINES = ("ddp", "zero2", "fsdp2", "zero3")
STATES = ("gradients, float32", "AdamW states, float32")
WEIGHTS = ("frozen base weights", "trained weights, float32")
GATHERED, BUCKETS = "weights gathered at a time", "buckets of the all-reduce"
COPY = "float32 copy of the trained weights"
AT_START = "whole weights at the start, beyond a step"
SHARDED = {"ddp": (), "zero2": STATES, "fsdp2": WEIGHTS + STATES, "zero3": WEIGHTS + STATES}


def units(model: nn.Module) -> tuple[float, list[float], list[float]]:
    """Bytes of the weights of a paired model that are gathered together, each in the precision it has: what is not in a
    layer; the layers below the first pair; and those from it on, a pair being one unit."""
    layers, (plan, _) = decoder_of(model).layers, plan_of(model)
    sizes = [float(sum(p.nbytes for p in layer.parameters())) for layer in layers]
    suffix = [sum(sizes[i] for i in block) for block in plan.blocks]
    return sum(p.nbytes for p in model.parameters()) - sum(sizes), sizes[: plan.first_layer], suffix


def memory_per_gpu(
    model: nn.Module, config: Config, kind: str, gpus: int, rows: int, engine: Engine
) -> dict[str, float]:
    """GiB by item on each of ``gpus`` GPUs under ``kind``, one of :data:`ENGINES`, with ``rows`` rows in one forward.

    Those of :func:`memory_gib`, of which each GPU holds its share where they are sharded. To these come what is
    gathered at a time (FSDP2, ZeRO-3), DDP's buckets, which are as large as the gradients, and DeepSpeed's float32 copy
    of its share of the trained weights, and what ZeRO-3 takes at the start, when the weights are still whole, beyond a
    step. FSDP2 cuts them in host memory, where each process has them whole. Not in it: the CUDA context and what the
    allocator loses (2 to 6 GiB).
    """
    items = memory_gib(model, config, engine, rows)
    trained, whole = items["trained weights, float32"], sum(items[name] for name in WEIGHTS)
    items |= {name: items[name] / gpus for name in SHARDED[kind]}
    if kind in ("fsdp2", "zero3"):
        outside, prefix, suffix = units(model)  # what is outside stays; a unit comes while the one before it computes
        items[GATHERED] = (outside + 2 * max(prefix + suffix)) / GIB
    if kind == "ddp" and gpus > 1:
        items[BUCKETS] = trained
    if kind.startswith("zero"):
        items[COPY] = trained / gpus
    if kind == "zero3":
        items[AT_START] = max(0.0, whole - sum(items.values()))
    return items


def collectives(model: nn.Module, kind: str, accumulation: int = 1, checkpointed: bool = False) -> dict[str, float]:
    """Bytes of the whole tensors in the collectives of one optimizer step of ``accumulation`` micro-batches, by kind.

    Gathered in each micro-batch: the prefix and what is outside of the layers once, since teacher and student share
    it, and each later unit for the teacher, the student and the backward; under ZeRO-3 with ``checkpointed`` blocks
    once more, to compute them again. FSDP2 prefetches one unit in vain, the last one, which ran before the student's
    first. DDP and FSDP2 reduce gradients in the last micro-batch, ZeRO in each; ZeRO-2 by an all-reduce.
    Counted on gloo (``tests/test_scaling.py``): DDP, FSDP2 and ZeRO-2 to the byte, ZeRO-3 to 2 %. ZeRO-3 gathers less
    of what it still has: by default it keeps up to a billion weights. Left out: buffers, which are some bytes.
    """
    (outside, prefix, suffix), gradients = units(model), 4.0 * count_parameters(model)[0]
    if kind == "ddp":
        return {"all-reduce": gradients}
    if kind == "zero2":
        return {"all-reduce": accumulation * gradients, "all-gather": gradients}
    if kind == "fsdp2":
        gathered = outside + sum(prefix) + 3 * sum(suffix) + suffix[-1]
        return {"all-gather": accumulation * gathered, "reduce-scatter": gradients}
    gathered = outside + sum(prefix) + (4 if checkpointed else 3) * sum(suffix)
    return {"all-gather": accumulation * gathered, "reduce-scatter": accumulation * gradients}
