"""COMPUTED tables for many GPUs: memory of each, bytes that it sends in a step, and the time of both by assumed rates.

The rates are NVIDIA's figures for one H100: a network of 400 Gb/s for each GPU, and 989 TFLOP/s in bf16, of which a
training step reaches 40 %. Communication that computation hides costs nothing: a step takes the longer of both times
at least, their sum at most.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.arguments import integers
from benchmarks.table import markdown
from lp_train.adapters import count_parameters
from lp_train.bench.flops import PEAK_FLOPS, step_flops
from lp_train.bench.scaling import (
    BUCKETS,
    COPY,
    ENGINES,
    GATHERED,
    STATES,
    WEIGHTS,
    collectives,
    memory_per_gpu,
)
from lp_train.bench.shapes import build_on_meta
from lp_train.config import Config, load_config
from lp_train.distill.compiled import Engine
from lp_train.dry_run import SHAPES
from lp_train.errors import UserError
from lp_train.pairing import PairPlan

NETWORK, MFU, ROOM_GIB = 50e9, 0.4, 72  # bytes/s; share; of 80 GB what is left beside the CUDA context
START, PAIRS = 15 / 32, 7 / 32  # of the depth: the window of configs/llama8b.yaml
MARKS = ("<!-- tables of scripts/bench.py scaling -->\n", "<!-- end of the tables -->")


def sent_per_gpu(found: dict[str, float], gpus: int) -> float:
    """Bytes that each GPU sends for these collectives as rings: (N - 1) / N of the tensor, an all-reduce twice that."""
    return sum(size * (2 if name == "all-reduce" else 1) for name, size in found.items()) * (gpus - 1) / gpus


def scale(config: Config, shape: str, gpus: list[int]) -> dict[str, Any]:
    """What each engine needs of each number of GPUs for one shape, every GPU having one micro-batch in a step."""
    path = SHAPES / f"{shape}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise UserError(f"--shapes {shape!r}: no such file in configs/shapes; use some of {known}")
    model_config = AutoConfig.from_pretrained(path)
    layers = model_config.num_hidden_layers
    start, pairs = round(START * layers), round(PAIRS * layers)
    plan = PairPlan.parse(f"{start}:{start + 2 * pairs}", num_layers=layers)
    model = build_on_meta(model_config, plan, config, torch.bfloat16)
    rows, length = config.train["per_device_train_batch_size"], config.train["max_length"]
    flops = step_flops(model, config, [length]).total(rows * length, rows * length)
    cells = []
    for number in gpus:
        for kind in ENGINES:
            memory = memory_per_gpu(model, config, kind, number, rows, Engine())
            found = collectives(model, kind, checkpointed=bool(config.train["gradient_checkpointing"]))
            cells.append({"gpus": number, "engine": kind, "memory_gib": memory, "whole_bytes": found})
            cells[-1] |= {"sent_bytes": sent_per_gpu(found, number)}
    trained, everything = count_parameters(model)
    seconds = flops / (MFU * (PEAK_FLOPS["H100"] or 1))
    shown = {"shape": shape, "parameters": everything - trained, "trained": trained, "compute_seconds": seconds}
    shown |= {"layers": layers, "depth": plan.effective_depth, "first": start, "pairs": pairs, "rank": config.lora["r"]}
    return {**shown, "rows": rows, "length": length, "cells": cells}


def table(found: dict[str, Any]) -> str:
    header = (
        "GPUs",
        "engine",
        "weights",
        "gathered",
        "gradients, AdamW",
        "activations, logits",
        "sum, GiB",
        "fits 80 GB",
    )
    rows = []
    for cell in found["cells"]:
        items = cell["memory_gib"]
        kept = sum(v for k, v in items.items() if k in ("activations", "logits of a chunk"))
        states = sum(v for k, v in items.items() if k in (*STATES, BUCKETS, COPY))
        parts = [sum(items[name] for name in WEIGHTS), items.get(GATHERED, 0.0), states, kept]
        total = sum(items.values())
        row = [f"{cell['gpus']:,}", cell["engine"], *(f"{part:,.1f}" for part in parts), f"{total:,.1f}"]
        row += ["yes" if total <= ROOM_GIB else "no", f"{cell['sent_bytes'] / 1e9:,.2f}"]
        rows.append([*row, f"{cell['sent_bytes'] / NETWORK:,.2f}"])
    head = f"### {found['shape']}\n\n{found['parameters'] / 1e9:,.1f} B parameters, {found['pairs']} pairs from layer "
    head += f"{found['first']}, depth {found['layers']} -> {found['depth']}; LoRA of rank {found['rank']}, "
    head += (
        f"{found['trained'] / 1e6:,.0f} M parameters. Each GPU {found['rows']} x {found['length']:,} tokens a step, "
    )
    head += f"computed in {found['compute_seconds']:,.2f} s.\n\n"
    return head + markdown((*header, "sent, GB", "sent in, s"), rows, left=(1, 7))


def command(options: argparse.Namespace) -> None:
    """Prints the tables and, as the last line, one JSON object; ``--page`` puts the tables into a page as well."""
    config = load_config(options.config, options.overrides)
    if not config.train.get("per_device_train_batch_size"):
        raise UserError("train.per_device_train_batch_size: missing; give the rows of one forward, for example 4")
    found = [scale(config, shape, options.gpus) for shape in options.shapes.split(",")]
    text = "\n\n".join(map(table, found))
    if options.page:
        options.page.write_text(in_page(options.page.read_text(), text))
    print(f"COMPUTED, not measured\n\n{text}\n\n{json.dumps({'computed': found})}")


def in_page(page: str, tables: str, marks: tuple[str, str] = MARKS) -> str:
    """The page with these tables between its two marks."""
    start, end = marks
    return re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}{tables}\n{end}", page, flags=re.DOTALL)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file: rank, rows, length, checkpointing; the shapes replace its model")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--shapes", default="Llama-3.1-8B,Llama-3.1-70B,Llama-3.1-405B", help="default %(default)s")
    parser.add_argument("--gpus", type=integers, default=[8, 32, 128, 512])
    parser.add_argument("--page", type=Path, help="also write the tables between the marks of this page")
