"""Speed and memory of training, on random weights and tokens: steps, a sweep over shapes, the loss alone.
Of tasks: lm-eval over our model object beside the bare model. Of inference: in order, paired and fused.

    python scripts/bench.py train --shape llama-8b --batch 8 --seq 2048 --out runs/train.jsonl
    python scripts/bench.py table runs/train.jsonl
    python scripts/bench.py sweep --shape llama-1b --out runs/sweep
    python scripts/bench.py loss --rows 16384 --width 4096 --vocab 128256
    python scripts/bench.py infer --shape llama-8b --modes graph --batches 1 --contexts 512 --out runs/infer.jsonl
    python scripts/bench.py predict runs/infer.jsonl
    python scripts/bench.py scaling configs/llama8b.yaml train.gradient_checkpointing=true
    python scripts/bench.py expect configs/llama8b.yaml
    python scripts/bench.py draft runs/demo --prompts 4
    python scripts/bench.py harness configs/smollm2_135m.yaml evaluate.tasks=[hellaswag_local] evaluate.task_data=DATA

On a CPU, in seconds:

    python scripts/bench.py train --shape smollm2-135m --layers 4 --pairs 1:3 --batch 1 --seq 64 --vocab 512 \\
        --steps 2 --warmup 1 --dtype float32 --no-compile
    python scripts/bench.py loss --rows 64 --width 32 --vocab 512 --dtype float32

Prints a table, and as the last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from benchmarks import draft, expect, infer, losses, many_gpus, predict, results, sweep, table, training
from benchmarks.arguments import positive, window_or_pairs
from benchmarks.case import SHAPES, Case
from lp_train import models
from lp_train.cluster.launch import quieten_libraries
from lp_train.config import load_config
from lp_train.errors import UserError, command_line, exit_code, require_package


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    quieten_libraries()
    return exit_code(lambda: options.run(options), options.debug)


def train(options: argparse.Namespace) -> None:
    keep = {"keep": results.appender(options.out)} if options.out else {}
    found = training.run(Case.of(options), variants_of(options.variants), say, **keep)
    report(table.training(found), found)


def show(options: argparse.Namespace) -> None:
    found = results.read(options.file)
    report("\n\n".join(map(table.training, found)), {"tables": found})


def run_sweep(options: argparse.Namespace) -> None:
    axes = sweep.Axes(options.sequences, options.vocabularies, options.depths, options.tokens)
    lines = sweep.run(Case.of(options), axes, options.out, say)
    report(f"{table.sweep(lines)}\n\n{options.out}/sweep.jsonl, {options.out}/sweep.png", {"cells": lines})


def loss(options: argparse.Namespace) -> None:
    device = models.device()
    dtype = models.resolve_dtype(options.dtype, device)
    found = losses.run(options.rows, options.width, options.vocab, dtype, device, options.repeats)
    report(table.losses(found), found)


def tasks(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if not config.evaluate.tasks:
        raise UserError("evaluate.tasks []: nothing to run; name tasks, e.g. evaluate.tasks=[hellaswag_local]")
    require_package("lm_eval", "harness", 'run `pip install -e ".[eval]"`')
    from benchmarks import harness  # all other benchmarks run without lm-eval

    found = harness.run(config, options.repeats, say)
    report(table.harness(found), found)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(text: str, found: dict[str, Any]) -> None:
    print(f"\n{text}\n\n{json.dumps(found)}", flush=True)


def variants_of(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in training.VARIANTS]:
        raise UserError(f"--variants {unknown[0]!r}: unknown; use some of {','.join(training.VARIANTS)}")
    return names


def parser() -> argparse.ArgumentParser:
    top = command_line("bench.py", __doc__)
    commands = top.add_subparsers(required=True)
    one = commands.add_parser("train", help="training steps: ours and what a user would otherwise run")
    one.set_defaults(run=train)
    one.add_argument("--variants", default=",".join(training.VARIANTS), help="default %(default)s")
    one.add_argument("--out", type=Path, help="file.jsonl; a line is appended when a variant is done")
    again = commands.add_parser("table", help="the tables of such a file")
    again.set_defaults(run=show)
    again.add_argument("file", type=Path)
    many = commands.add_parser("sweep", help="time per token over sequence, vocabulary and first pair")
    many.set_defaults(run=run_sweep)
    many.add_argument("--out", type=Path, required=True, help="folder of sweep.jsonl and sweep.png")
    many.add_argument("--sequences", type=integers, default=sweep.Axes.seq)
    many.add_argument("--vocabularies", type=integers, default=sweep.Axes.vocab)
    many.add_argument("--depths", type=numbers, default=sweep.Axes.depth, help="first pair, as a share of the layers")
    many.add_argument("--tokens", type=positive, default=sweep.Axes.tokens, help="of a batch along --sequences")
    for command in (one, many):
        add_case(command)
    alone = commands.add_parser("loss", help="the loss over the head alone")
    alone.set_defaults(run=loss)
    for name, value in {"rows": 16384, "width": 4096, "vocab": 128256, "repeats": 5}.items():
        alone.add_argument(f"--{name}", type=positive, default=value, help="default %(default)s")
    alone.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    inference = commands.add_parser("infer", help="prefill, decoding, generation: in order, paired, fused")
    inference.set_defaults(run=infer.command)
    infer.add_options(inference)
    several = commands.add_parser("predict", help="PREDICTED speed-up on 2, 4, 8 GPUs, from the file of infer --out")
    several.set_defaults(run=predict.command)
    predict.add_options(several)
    computed = commands.add_parser("scaling", help="COMPUTED memory and communication of DDP, ZeRO and FSDP2 on N GPUs")
    computed.set_defaults(run=many_gpus.command)
    many_gpus.add_options(computed)
    expected = commands.add_parser("expect", help="COMPUTED memory and time of a recipe, MEASURED where it was")
    expected.set_defaults(run=expect.command)
    expect.add_options(expected)
    assisted = commands.add_parser("draft", help="lossless use: a run's fused model as the draft of its original")
    assisted.set_defaults(run=draft.command)
    draft.add_options(assisted)
    over = commands.add_parser("harness", help="tasks through lm-eval, and the bare model over the same inputs")
    over.set_defaults(run=tasks)
    over.add_argument("config", help="a YAML file with evaluate.tasks")
    over.add_argument("overrides", nargs="*", metavar="key.path=value")
    over.add_argument("--repeats", type=positive, default=3, help="default %(default)s")
    for command in commands.choices.values():  # --debug also behind the benchmark's name
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def add_case(command: argparse.ArgumentParser) -> None:
    default = Case("")
    command.add_argument("--shape", choices=SHAPES, required=True)
    command.add_argument("--batch", type=positive, help="rows; default 8, smollm2-135m 32")
    command.add_argument("--seq", type=positive, help="tokens of a row; default 2048, smollm2-135m 1024")
    command.add_argument("--pairs", type=window_or_pairs, help="15:29 or [[4,5],[8,9]]; default: the shape's own")
    for name in ("rank", "steps", "warmup", "documents"):
        command.add_argument(f"--{name}", type=positive, default=getattr(default, name), help="default %(default)s")
    command.add_argument("--vocab", type=positive, help="default: the shape's own")
    command.add_argument("--layers", type=positive, help="default: the shape's own")
    command.add_argument("--gradient-checkpointing", action="store_true", help="for ours; a has it, b and c have not")
    command.add_argument("--no-compile", dest="compile", action="store_false", help="ours uncompiled, and no c")
    command.add_argument("--fp8", action="store_true", help="ours: the frozen projections in FP8")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default=default.dtype)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


if __name__ == "__main__":
    sys.exit(main())
