"""Will a plan pay on this machine? What seconds of measuring say here, and what follows from it by arithmetic.

A pair costs as many bytes and FLOPs as its two layers: what it saves is one layer's round of kernels and of Python. So
single tokens are timed through one layer, two layers and one wide layer of the model's shape, and
step = t(1 layer) + (L - 1) * (t(2 layers) - t(1 layer)) + head; the fused one takes t(2 layers) - t(wide layer) less
for each pair, and at most one layer's time. Weights are constants: they cost what other values cost.
"""

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
    product, copied = seconds(where, lambda: torch.mm(a, b), lambda: target.copy_(source))
    return Rates(2 * size**3 / product, 8 * numbers / copied)


@torch.no_grad()
def decoding(model: nn.Module, where: torch.device, room_gib: float) -> Decoding:
    """Times layers of a paired ``model``'s shape (one on meta will do) in ``room_gib`` of memory.

    Raises:
        UserError: no pair that can be fused (with the reason), or too little room for two layers and a wide one.
    """
    (plan, algebra), dtype, config = plan_of(model), model.dtype, model.config
    made, kept = blocks(model)
    wide = [block for block in made if len(block) == 2]
    if not wide:
        raise UserError(f"no pair can be fused, so none is faster: {'; '.join(dict.fromkeys(kept.values()))}")
    small = _two_layers(config, wide[0])
    with torch.device("meta"):
        two, paired = (AutoModelForCausalLM.from_config(small, dtype=dtype) for _ in range(2))
        pair_layers(paired, PairPlan.parse("0:2", num_layers=2), algebra)
        fused = CLASSES[config.model_type][1](config_of(paired, [(0, 1)])).to(dtype)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
    models = (two, fused, head)
    need = sum(p.nbytes for part in models for p in part.parameters()) / GIB
    if need > room_gib:
        raise UserError(f"not timed: four layers and the head take {need:.1f} GiB, {room_gib:.1f} are free")
    for part in models:
        part.to_empty(device=where).eval()
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.fill_(0.01)
    token = torch.ones(1, 1, dtype=torch.long, device=where)
    hidden = torch.full((1, config.hidden_size), 0.01, dtype=dtype, device=where)

    def in_order(layers: int) -> None:
        two.config.num_hidden_layers = layers  # Transformers runs as many
        two(token, use_cache=False)

    times = seconds(
        where, lambda: in_order(2), lambda: in_order(1), lambda: fused(token, use_cache=False), lambda: head(hidden)
    )
    return predicted(*times, layers=plan.num_layers, pairs=len(wide))


def predicted(two: float, one: float, wide: float, head: float, *, layers: int, pairs: int) -> Decoding:
    """By the rule above, from the seconds of models of two layers, one layer and one wide layer, and of the head."""
    layer = max(two - one, 0.0) or two / 2
    step = two + (layers - 2) * layer + head
    return Decoding(step, step - pairs * min(two - wide, layer))


def _two_layers(config: Any, pair: tuple[int, ...]) -> Any:
    small = copy.deepcopy(config)
    for name in PER_LAYER:
        if values := getattr(config, name, None):
            setattr(small, name, [values[i] for i in pair])
    small.num_hidden_layers, small.vocab_size = 2, VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return small


def seconds(where: torch.device, *runs: Callable[[], Any]) -> list[float]:
    """The fastest time of each: in turns, so that what disturbs one disturbs all, for ``BUDGET`` each after a first
    turn; of a first turn that takes as long, its times."""
    for run in runs if where.type == "cuda" else ():
        run()  # libraries are loaded and kernels chosen in a first call
    times = [[_once(run, where)] for run in runs]
    left = BUDGET * len(runs)
    if sum(first for (first,) in times) >= left:
        return [first for (first,) in times]
    while left > 0:
        for run, taken in zip(runs, times, strict=True):
            taken.append(_once(run, where))
            left -= taken[-1]
    return [min(taken[1:]) for taken in times]


def _once(run: Callable[[], Any], where: torch.device) -> float:
    start = time.perf_counter()
    run()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - start
