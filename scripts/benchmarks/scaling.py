"""Training on several GPUs: a step's time, memory and communication; the adapters of one and of several; a killed run.

    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 4 -m benchmarks.scaling \\
        step --cell ddp --out runs/scaling --shape llama-8b

``scripts/bench_scaling.sh`` makes all figures in one call. Weights and tokens are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from benchmarks import table
from benchmarks.case import SHAPES, Case, build_config, model_config, plan, random_rows
from benchmarks.results import appender
from benchmarks.training import StepClock, origin, paired_model, paired_trainer
from lp_train import models
from lp_train.bench.shapes import build_on_meta
from lp_train.cluster import engine
from lp_train.cluster.launch import check_engine, leave, quieten_libraries
from lp_train.cluster.shard import shard
from lp_train.config import Config
from lp_train.data import RowCollator
from lp_train.distill import packed_attention
from lp_train.distill.arguments import training_arguments
from lp_train.distill.trainer import PairedTrainer

FILE = "scaling.jsonl"
HEADER = ("cell", "GPUs", "layers", "tokens/s", "of linear", "GiB per GPU", "communication, ms", "exposed, ms")


class AtStep(TrainerCallback):
    """Profiles one step, and ends the process by SIGKILL after one; 0: neither."""

    def __init__(self, profiled: int = 0, killed: int = 0) -> None:
        self.profiled, self.killed = profiled, killed
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.profiled and torch.cuda.is_available():
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.profiled and torch.cuda.is_available():
            torch.cuda.synchronize()
            self.profile.stop()
        if state.global_step == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)


def step(options: argparse.Namespace) -> None:
    """Time and memory of a step, and of one more its communication."""
    state = start()
    case = Case.of(options, processes=state.num_processes)
    clock, profiled = StepClock(case.warmup, case.steps), AtStep(profiled=case.warmup + case.steps + 1)
    with tempfile.TemporaryDirectory() as folder:
        callbacks, last = [clock, profiled], profiled.profiled
        trainer = make_trainer(case, state, Path(folder), callbacks, options.in_parts, max_steps=last)
        if state.device.type == "cuda":
            torch.cuda.empty_cache()  # of whole weights before they were cut
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    gib = torch.cuda.max_memory_allocated() / 2**30 if state.device.type == "cuda" else None
    ranks = gather_object([{"gib": gib, **communication(profiled.profile)}])
    figures = clock.figures()
    keep(options, state, {
        "case": dataclasses.asdict(case),
        "layers": model_config(case).num_hidden_layers,
        "pairs": len(plan(case).pairs),
        "compiled": trainer.engine.compile_blocks,
        "tokens_per_second": case.tokens_per_step / figures["ms_per_step"] * 1e3,
        **figures,
        **{name: max((rank[name] for rank in ranks), key=lambda v: v or 0.0) for name in ranks[0]},
        **trainer.engine_seen,
    })  # fmt: skip
    leave(state)


def train(options: argparse.Namespace) -> None:
    """A short run in a folder, with checkpoints: ended by SIGKILL after step ``--kill``, or gone on with."""
    state, folder = start(), options.out / options.cell
    case = Case("smollm2-135m", options.rows // state.num_processes, options.seq, layers=options.layers)
    case = dataclasses.replace(case, vocab=options.vocab, dtype=options.dtype, compile=False, warmup=0)
    case = dataclasses.replace(case, steps=options.steps, processes=state.num_processes)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "learning_rate": 5e-3}
    trainer = make_trainer(case, state, folder, [AtStep(killed=options.kill)], **saving)
    trainer.train(resume_from_checkpoint=str(newest(folder)) if options.resume else None)
    losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    keep(options, state, {"losses": losses, **trainer.engine_seen})
    leave(state)


def start() -> PartialState:
    quieten_libraries()
    if os.environ.get("LP_TINY") and engine.asked() in engine.SHARDED:
        from benchmarks.cpu_engines import pretend

        pretend()
    state = PartialState(cpu=models.device().type == "cpu")
    check_engine(state)
    return state


def make_trainer(
    case: Case,
    state: PartialState,
    folder: Path,
    callbacks: list[TrainerCallback],
    in_parts: bool = False,
    **options: Any,
) -> PairedTrainer:
    config = build_config(case, case.gradient_checkpointing)
    config.train.update(options)
    model = build_in_parts(case, config, state) if in_parts else shard(paired_model(case, config, state.device))
    if not case.compile:  # the baselines' attention is to be compiled
        model.config.get_text_config()._attn_implementation = packed_attention.NAME
    dtype = models.resolve_dtype(case.dtype, state.device)
    common: dict[str, Any] = {"model": model, "train_dataset": random_rows(case), "callbacks": callbacks}
    common["args"] = training_arguments(config, folder, state, dtype, "none")
    return paired_trainer(case, config, RowCollator(case.size[1], pad_token_id=0), common)


def build_in_parts(case: Case, config: Config, state: PartialState) -> nn.Module:
    """Under FSDP2: other random weights, of a shape of which one GPU does not hold all."""
    dtype = models.resolve_dtype(case.dtype, state.device)
    model = shard(build_on_meta(model_config(case), plan(case), config, dtype)).to_empty(device=state.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.to_local().fill_(1.0) if "norm" in name else p.to_local().normal_(0, 0.02)
            if "lora_B" in name:
                p.to_local().zero_()
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    fresh = type(rotary)(model.config)
    for name, buffer in rotary.named_buffers():
        buffer.copy_(fresh.get_buffer(name))
    return model


def communication(profile: torch.profiler.profile) -> dict[str, float | None]:
    """Of one step on this process's GPU: ms in collectives, waiting for other processes included, and ms of those in
    which nothing else ran."""
    if not torch.cuda.is_available():
        return {"communication_ms": None, "exposed_ms": None}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    collectives = [e for e in on_gpu if "nccl" in e["name"].lower()]
    others = [e for e in on_gpu if "nccl" not in e["name"].lower()]
    return {
        "communication_ms": covered(collectives) / 1e3,
        "exposed_ms": (covered(on_gpu) - covered(others)) / 1e3,
    }


def covered(events: Iterable[dict[str, Any]]) -> float:
    """Time in which at least one of them runs, in their unit."""
    total, end = 0.0, 0.0
    for begin, until in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def keep(options: argparse.Namespace, state: PartialState, line: dict[str, Any]) -> None:
    if state.is_main_process:
        appender(options.out / FILE)({"cell": options.cell, **line, **origin(state.device)})


# --- the end ---------------------------------------------------------------------------------------------------------


def show(options: argparse.Namespace) -> None:
    """The table, what the runs agree on, and one JSON line."""
    lines = [json.loads(line) for line in (options.out / FILE).read_text().splitlines()]
    text, steps = steps_table(lines)
    print(text)
    kept = "cell engine num_processes layers compiled tokens_per_second of_linear ms_of_blocks gib communication_ms "
    kept += "exposed_ms share_held device commit"
    found: dict[str, Any] = {"steps": [{name: line[name] for name in kept.split()} for line in steps]}
    runs = {line["cell"]: line["losses"] for line in lines if "losses" in line}
    found["agree"] = agreements(options.out, runs)
    for name, figures in found["agree"].items():
        print(f"{name}: {figures}")
    print(f"\n{json.dumps(found)}")


def steps_table(lines: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The table of measured steps, and their lines with ``of_linear``: tokens/s over those of one GPU times as many."""
    steps = [line for line in lines if "tokens_per_second" in line]
    alone = {line["case"]["shape"]: line["tokens_per_second"] for line in steps if line["num_processes"] == 1}
    rows = []
    for line in steps:
        base = alone.get(line["case"]["shape"])
        line["of_linear"] = line["tokens_per_second"] / base / line["num_processes"] if base else None
        forms = {"of_linear": "{:.1%}", "gib": "{:.1f}", "communication_ms": "{:.1f}", "exposed_ms": "{:.1f}"}
        named = [line["cell"], str(line["num_processes"]), str(line["layers"]), f"{line['tokens_per_second']:,.0f}"]
        rows.append([*named, *(table.cell(line[name], form) for name, form in forms.items())])
    return table.markdown(HEADER, rows), steps


def agreements(out: Path, losses: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Each run against that of its engine which one process made or which was not killed: the largest relative
    difference of a loss, and of an adapter's matrix in the last checkpoint (norm of the difference over its norm)."""
    found: dict[str, Any] = {}
    for cell, ours in losses.items():
        if (reference := "one" if cell.endswith("whole") else f"{cell.partition('-')[0]}-whole") not in losses:
            continue
        theirs = losses[reference]
        curve = max(abs(ours[i] - theirs[i]) / theirs[i] for i in ours)
        last = [newest(out / name) for name in (cell, reference)]
        a, b = (load_file(folder / "adapter_model.safetensors") for folder in last)
        same = a.keys() == b.keys() and last[0].name == last[1].name
        apart = max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b) if same else None
        found[f"{cell} against {reference}"] = {"steps": len(ours), "loss": curve, "adapter": apart}
    return found


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, default = top.add_subparsers(required=True), Case("")
    one, run, shown = (commands.add_parser(f.__name__, help=(f.__doc__ or "")[:60]) for f in (step, train, show))
    for command, function in ((one, step), (run, train), (shown, show)):
        command.set_defaults(run=function)
        command.add_argument("--out", type=Path, required=True, help="folder of scaling.jsonl")
    for command in (one, run):
        command.add_argument("--cell", required=True, help="its name in the table")
        for name in ("layers", "vocab"):
            command.add_argument(f"--{name}", type=int)
        command.add_argument("--dtype", default=default.dtype)
    one.add_argument("--shape", choices=SHAPES, required=True)
    for name in ("batch", "seq", "steps", "warmup"):
        one.add_argument(f"--{name}", type=int, default=getattr(default, name))
    one.add_argument("--in-parts", action="store_true", help="no process ever holds all weights; FSDP2 only")
    one.add_argument("--no-compile", dest="compile", action="store_false")
    one.add_argument("--gradient-checkpointing", action="store_true")
    for name, value in {"rows": 8, "seq": 256, "steps": 12, "kill": 0}.items():
        run.add_argument(f"--{name}", type=int, default=value)
    run.add_argument("--resume", action="store_true")
    return top


if __name__ == "__main__":
    chosen = parser().parse_args()
    sys.exit(chosen.run(chosen))
