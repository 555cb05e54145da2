"""One rank of a world on gloo: what a step of a real engine sends and holds, counted.

Arguments: the engine, "ddp" or "fsdp2", and a configuration. Rank 0 prints a JSON line without and one with gradient
checkpointing.
"""

import json
import sys
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

from lp_train.adapters import attach
from lp_train.cluster.launch import leave
from lp_train.cluster.shard import shard_layers
from lp_train.config import Config, LossConfig, load_config
from lp_train.distill.losses import Head, head_loss
from lp_train.distill.replay import run_original, run_suffix
from lp_train.distill.trainer import next_labels
from lp_train.pairing import PairPlan, pair_layers

SENT = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


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
    """Adds up the bytes of the whole tensors of each kind of collective; any other kind is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d" and name != "barrier":
            biggest = max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            self.payload[SENT[name]] = self.payload.get(SENT[name], 0) + biggest
        return func(*args, **(kwargs or {}))


def held(tensors: Any) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.nbytes for t in local if t.ndim)  # AdamW's own count of steps left out


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Any]) -> None:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    _ForwardRedirection()(model, inner, loss_sum, inner, COLLATE(rows)).backward()
    optimizer.step()


def case(engine: str, config: Config, checkpointing: bool, state: PartialState) -> dict[str, Any]:
    model = build(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if engine == "fsdp2":
        fully_shard(shard_layers(model))
        assert isinstance(model, FSDPModule)
    else:
        model = DistributedDataParallel(model, broadcast_buffers=False)  # a rotary table's few bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    rows = list(packed_rows(2, 300))
    for _ in range(2):  # buckets and groups are made in the first two
        step(model, optimizer, rows)
        optimizer.zero_grad()
    with Collectives() as counted:
        step(model, optimizer, rows)
    return {
        "payload": counted.payload,
        "frozen": held(p for p in model.parameters() if not p.requires_grad),
        "trained": held(trained),
        "gradients": held(p.grad for p in trained),
        "optimizer": held(v for s in optimizer.state.values() for v in s.values()),
        "processes": state.num_processes,
    }


if __name__ == "__main__":
    started = PartialState(cpu=True)
    for with_checkpointing in (False, True):
        found = case(sys.argv[1], load_config(sys.argv[2]), with_checkpointing, started)
        if started.is_main_process:
            print(json.dumps(found), flush=True)
    leave(started)
