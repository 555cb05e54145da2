"""Will a plan pay on this machine? What seconds of measuring say here, and what follows from it by arithmetic.

A pair costs as many bytes and FLOPs as its two layers: what it saves is one layer's round of kernels and of Python. So
single tokens are timed through one layer, two layers and one wide layer of the model's shape, and
step = t(1 layer) + (L - 1) * (t(2 layers) - t(1 layer)) + head; the fused one takes t(2 layers) - t(wide layer) less
for each pair. Weights are constants: they cost what other values cost.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lp_train.bench.memory import GIB
from lp_train.errors import UserError
from lp_train.modeling_layer_parallel import CLASSES
from lp_train.pairing import PairPlan, pair_layers, plan_of
from lp_train.pairing.fuse import PER_LAYER, blocks, config_of

BUDGET = 0.3  # seconds for each thing that is timed, beside its warm-up
SHARES = {  # of the measured products that recorded training steps reach
    # recipes/benchmarks/README.md
    "cuda": {"68 % (8B on an H100)": 0.68, "29 % (SmolLM2-135M on an H100)": 0.29},
    # the demo's 20 TFLOP in 236 s on two cores, each of which multiplies at 0.069 TFLOP/s at best
    "cpu": {"60 % (the demo on 2 cores)": 0.6},
}
VOCABULARY = 64  # of the models that are timed; their head is timed by itself


class Rates(NamedTuple):
    """What a device does in a second: FLOPs in large products of the model's precision; bytes that a large copy reads
    and writes."""

    flops: float
    bytes: float


class Decoding(NamedTuple):
    """Seconds for a token at batch 1 behind no cache: of the model in order, and fused."""

    in_order: float
    fused: float


def rates(dtype: torch.dtype, where: torch.device) -> Rates:
    """Measures both, in about a second."""
    size, numbers = (8192, 2**29) if where.type == "cuda" else (1024, 2**25)
    a, b = (torch.full((size, size), 0.01, dtype=dtype, device=where) for _ in range(2))
    source = torch.ones(numbers, device=where)
    target = torch.empty_like(source)
    products = seconds(lambda: torch.mm(a, b), where)
    return Rates(2 * size**3 / products, 8 * numbers / seconds(lambda: target.copy_(source), where))


def decoding(model: nn.Module, where: torch.device, room_gib: float) -> Decoding:
    """Times layers of a paired ``model``'s shape (one on meta will do), of which ``room_gib`` hold two.

    Raises:
        UserError: no pair that can be fused (with the reason), or too little room for two layers.
    """
    (plan, algebra), dtype, config = plan_of(model), model.dtype, model.config
    made, kept = blocks(model)
    wide = [block for block in made if len(block) == 2]
    if not wide:
        raise UserError(f"no pair can be fused, so none is faster: {'; '.join(dict.fromkeys(kept.values()))}")
    small = _two_layers(config, wide[0])
    with torch.device("meta"):
        two = AutoModelForCausalLM.from_config(small, dtype=dtype)
        head = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
    need = max(sum(p.nbytes for p in two.parameters()), head.nbytes) / GIB
    if need > room_gib / 2:
        raise UserError(f"not timed: two layers or the head take {need:.1f} GiB, {room_gib:.1f} are free")
    two_seconds = _token_seconds(two, where)
    with torch.device("meta"):
        paired = pair_layers(AutoModelForCausalLM.from_config(small, dtype=dtype), PairPlan.parse("0:2", 2), algebra)
        fused = CLASSES[config.model_type][1](config_of(paired, [(0, 1)])).to(dtype)
    two.config.num_hidden_layers = 1  # Transformers runs as many
    one_seconds, wide_seconds = _token_seconds(two, where), _token_seconds(fused, where)
    head = torch.full_like(head, 0.01, device=where)
    hidden = torch.full((1, config.hidden_size), 0.01, dtype=dtype, device=where)
    head_seconds = seconds(lambda: nn.functional.linear(hidden, head), where)
    return predicted(two_seconds, one_seconds, wide_seconds, plan.num_layers, len(wide), head_seconds)


def predicted(two: float, one: float, wide: float, layers: int, pairs: int, head: float) -> Decoding:
    """By the rule above, from the seconds of models of two layers, one layer, and one wide layer."""
    layer = max(two - one, 0.0) or two / 2
    step = two + (layers - 2) * layer + head
    return Decoding(step, step - pairs * (two - wide))


def _two_layers(config: Any, pair: tuple[int, ...]) -> Any:
    small = copy.deepcopy(config)
    for name in PER_LAYER:
        if values := getattr(config, name, None):
            setattr(small, name, [values[i] for i in pair])
    small.num_hidden_layers, small.vocab_size = 2, VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return small


@torch.no_grad()
def _token_seconds(model: Any, where: torch.device) -> float:
    model = model.to_empty(device=where).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    token = torch.ones(1, 1, dtype=torch.long, device=where)
    return seconds(lambda: model(token, use_cache=False), where)


def seconds(run: Callable[[], Any], where: torch.device) -> float:
    """The fastest of as many runs as fit into ``BUDGET``, after a first one; where that does not fit, its time."""
    taken = [_once(run, where)]
    while taken[0] < BUDGET and sum(taken[1:]) < BUDGET:
        taken.append(_once(run, where))
    return min(taken[1:] or taken)


def _once(run: Callable[[], Any], where: torch.device) -> float:
    start = time.perf_counter()
    run()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - start
