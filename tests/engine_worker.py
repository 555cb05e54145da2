"""One rank of an engine: a step of the trainer for each case, whose adapter is saved; see test_engines.py.

Arguments: folder of the model, folder for results, and for the wrong unit of FSDP2 ``layers``.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tiny_trainer import COLLATE, packed_rows, trainer_maker
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.cpu_engines import pretend
from lp_train.cluster import engine, shard
from lp_train.cluster.launch import leave
from lp_train.distill.trainer import PairedTrainer
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing.families import decoder_of

# One step of plain descent at rate 1 from one global batch: what is saved is the start less the gradient.
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
ROWS = 8


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Both algebras, without and with gradient checkpointing of either kind; and frozen weights in bfloat16."""
    for algebra in ("lp", "par"):
        yield f"{algebra}-plain", {"algebra": algebra}
        for reentrant in (False, True):
            kind = "reentrant" if reentrant else "checkpointed"
            yield f"{algebra}-{kind}", {"algebra": algebra, "gradient_checkpointing": {"use_reentrant": reentrant}}
    yield "lp-bfloat16", {"algebra": "lp", "frozen": torch.bfloat16}


def run(model: Path, results: Path, name: str, case: dict[str, Any], state: PartialState) -> PairedTrainer:
    engine.load_whole()
    make = trainer_maker(LlamaForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), results)
    checkpointing = case.pop("gradient_checkpointing", None)
    case |= {"batch": (1, ROWS // state.num_processes), "use_cpu": engine.asked() in engine.WHOLE}
    trainer = make(name=name, rows=ROWS, gradient_checkpointing=checkpointing is not None, **case, **STEP)
    trainer.args.gradient_checkpointing_kwargs = checkpointing  # TRL has one kind only for ZeRO-3
    trainer.train()
    trainer.save_model(str(results / name))
    rank, world, rows = state.process_index, state.num_processes, list(packed_rows(5, 300))
    figures = measure(trainer.model, rows, COLLATE, 2, {"now": as_it_is}, rank=rank, world_size=world)["now"].as_dict()
    if state.is_main_process:
        found = {"figures": figures, "loss": trainer.state.log_history[0]["loss"], **trainer.engine_seen}
        found["dtypes"] = sorted({(p.requires_grad, str(p.dtype)) for p in trainer.model.parameters()})
        (results / f"{name}.json").write_text(json.dumps(found))
    return trainer


def main(model: str, results: str, unit: str = "pairs") -> None:
    if engine.asked() in engine.SHARDED:
        pretend()
    state = PartialState(cpu=engine.asked() in engine.WHOLE)
    if unit == "layers":
        shard.shard_layers = lambda model, **options: (
            [fully_shard(layer) for layer in decoder_of(model).layers] and model
        )
    for name, case in cases():
        run(Path(model), Path(results), name, case, state)
    leave(state)


if __name__ == "__main__":
    main(*sys.argv[1:])
