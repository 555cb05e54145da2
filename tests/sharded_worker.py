"""One rank of a world on gloo: the gradient and the held-out figures of a sharded model against those of a whole one.

Argument: what is one unit, "pairs" or "layers". Rank 0 prints a JSON line for each algebra, without and with gradient
checkpointing.
"""

import json
import sys
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from tiny_trainer import COLLATE, packed_rows
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lp_train.cluster.launch import leave
from lp_train.cluster.shard import inside, shard_layers, sharded_parameters, whole
from lp_train.config import LossConfig
from lp_train.distill.losses import Head, head_loss
from lp_train.distill.replay import run_original, run_suffix
from lp_train.distill.trainer import next_labels
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import pair_layers
from lp_train.pairing.families import decoder_of

LOSS = LossConfig(kd=1.0, ce=0.5)


def build(algebra: str, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    base = pair_layers(LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).float(), "2:6", algebra)
    targets = [f"model.layers.{i}.{name}" for i in range(2, 6) for name in ("self_attn.q_proj", "mlp.down_proj")]
    model = get_peft_model(base.requires_grad_(False), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    recording = run_original(model, batch)
    hidden, _ = run_suffix(model, recording)
    states = (of.flatten(0, 1)[batch["trained"]] for of in (hidden, recording.final))
    return head_loss(*states, next_labels(batch["labels"])[batch["trained"]], Head.of(model), LOSS)[0]


def gradients(model: nn.Module, rows: list[Any], share: float) -> dict[str, Tensor]:
    model.zero_grad()
    (share * inside(model, loss_sum, model, COLLATE(rows))).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def case(algebra: str, checkpointing: bool, unit: str, state: PartialState) -> dict[str, Any]:
    rank, world, rows = state.process_index, state.num_processes, list(packed_rows(8, 300))
    expected_model, model = build(algebra, checkpointing), build(algebra, checkpointing)
    expected = gradients(expected_model, rows, 1.0)
    if unit == "pairs":
        shard_layers(model)
    else:
        for layer in decoder_of(model).layers:
            fully_shard(layer)
    fully_shard(model)
    found: dict[str, Any] = {"processes": world, "sharded": sharded_parameters(model)}
    found["held"] = sum(p.to_local().numel() for p in model.parameters())
    found |= {"parameters": len(list(model.parameters())), "all": sum(p.numel() for p in model.parameters())}
    errors = []
    for _ in range(2):  # the second time after a measurement in between
        ours = gradients(model, rows[rank::world], float(world))
        errors += [float((ours[n] - e).abs().max() / e.abs().max()) for n, e in expected.items()]
        figures = measure(model, rows, COLLATE, 2, {"now": as_it_is}, rank=rank, world_size=world)["now"]
    whole_figures = measure(expected_model, rows, COLLATE, 2, {"now": as_it_is}, rank=rank, world_size=world)["now"]
    return found | {"error": max(errors), "figures": figures.as_dict(), "expected": whole_figures.as_dict()}


def main(unit: str) -> None:
    state = PartialState(cpu=True)
    for algebra in ("lp", "par"):
        for checkpointing in (False, True):
            found = case(algebra, checkpointing, unit, state)
            if state.is_main_process:
                print(json.dumps(found), flush=True)
    leave(state)


if __name__ == "__main__":
    main(sys.argv[1])
