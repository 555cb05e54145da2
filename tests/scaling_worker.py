"""One rank of a world on gloo: what a step of a real engine sends and holds, counted.

Arguments: the engine, one of lp_train.bench.scaling.ENGINES, and a configuration. Rank 0 prints a JSON line without and
one with gradient checkpointing.
"""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from tiny_trainer import COLLATE, packed_rows
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from trl.models.utils import _ForwardRedirection

from benchmarks.cpu_engines import pretend
from lp_train.adapters import attach
from lp_train.cluster.engine import fit_deepspeed
from lp_train.cluster.launch import leave
from lp_train.cluster.shard import shard_layers
from lp_train.config import Config, LossConfig, load_config
from lp_train.distill.losses import Head, head_loss
from lp_train.distill.replay import run_original, run_suffix
from lp_train.distill.trainer import next_labels
from lp_train.pairing import PairPlan, pair_layers

SENT = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}

NUMBER = 8  # bytes
ANEW = {f"stage3_{name}": 0 for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")}


def build(config: Config) -> nn.Module:
    """Six layers in float32; embeddings and head are two."""
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    plan = PairPlan.parse(config.plan.pairs, num_layers=6)
    return attach(pair_layers(LlamaForCausalLM(LlamaConfig(**shape)).float(), plan), plan, config).train()


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    recording = run_original(model, batch)
    hidden, _ = run_suffix(model, recording)
    states = (of.flatten(0, 1)[batch["trained"]] for of in (hidden, recording.final))
    labels = next_labels(batch["labels"])[batch["trained"]]
    return head_loss(*states, labels, Head.of(model), LossConfig())[0]


class Collectives(TorchDispatchMode):
    """Adds up the bytes of the whole tensors of each kind of collective, but for single numbers (DeepSpeed's norm); any
    other kind is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d" and name != "barrier":
            biggest = max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            if biggest > NUMBER:
                self.payload[SENT[name]] = self.payload.get(SENT[name], 0) + biggest
        return func(*args, **(kwargs or {}))


def held(tensors: Any) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.nbytes for t in local if t.ndim)  # AdamW's own count of steps left out


def in_deepspeed(model: nn.Module, stage: int) -> Callable[[list[Any]], None]:
    """A step of ZeRO, which fetches weights anew each time, as it must where a model is large."""
    deepspeed = importlib.import_module("deepspeed")
    options = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, **(ANEW if stage == 3 else {})},
    }
    fit_deepspeed(options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]

    def step(rows: list[Any]) -> None:
        engine.backward(_ForwardRedirection()(engine, model, loss_sum, model, COLLATE(rows)))
        engine.step()

    return step


def in_torch(wrapped: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[list[Any]], None]:
    def step(rows: list[Any]) -> None:
        optimizer.zero_grad()
        _ForwardRedirection()(wrapped, model, loss_sum, model, COLLATE(rows)).backward()
        optimizer.step()

    return step


def case(engine: str, config: Config, checkpointing: bool, state: PartialState) -> dict[str, Any]:
    model = build(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if engine.startswith("zero"):
        return {"payload": count(in_deepspeed(model, int(engine[-1]))), "processes": state.num_processes}
    if engine == "fsdp2":
        fully_shard(shard_layers(model))
        assert isinstance(model, FSDPModule)
        wrapped: nn.Module = model
    else:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)  # a rotary table's few bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    return {
        "payload": count(in_torch(wrapped, model, optimizer)),
        "frozen": held(p for p in model.parameters() if not p.requires_grad),
        "trained": held(trained),
        "gradients": held(p.grad for p in trained),
        "optimizer": held(v for s in optimizer.state.values() for v in s.values()),
        "processes": state.num_processes,
    }


def count(step: Callable[[list[Any]], None]) -> dict[str, int]:
    """Bytes of the third step: buckets and groups are made in the first two."""
    rows = list(packed_rows(2, 300))
    for _ in range(2):
        step(rows)
    with Collectives() as counted:
        step(rows)
    return counted.payload


if __name__ == "__main__":
    if sys.argv[1].startswith("zero"):
        pretend()
    started = PartialState(cpu=True)
    for with_checkpointing in (False, True):
        found = case(sys.argv[1], load_config(sys.argv[2]), with_checkpointing, started)
        if started.is_main_process:
            print(json.dumps(found), flush=True)
    leave(started)
