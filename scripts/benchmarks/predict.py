"""PREDICTED speed-up under tensor parallelism: one GPU's measured steps, counted all-reduces, published latencies.

A step of a small batch waits for memory, which N GPUs divide, and for its all-reduces, which they do not:
t(N) = t(1) / N + n * latency(N), with n = two for each layer and two for the sharded embedding and head (the count
that ``tests/test_tensor_parallel.py`` makes). Kernels that get too small to fill a GPU are not in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import infer_table
from benchmarks.table import markdown
from lp_train.errors import UserError

PREDICTED = "PREDICTED, not measured\n\n"
PER_LAYER, BESIDE = 2, 2
LATENCIES_US = {  # of one all-reduce of 8 to 32 KiB, by number of GPUs, as published
    "H100 NVLink, one-shot kernel (sgl-project/sglang#2904)": {2: 4.5, 4: 4.8, 8: 7.8},
    "H100 NVLink, vLLM's kernel (sgl-project/sglang#2904)": {2: 8.7, 4: 9.2, 8: 11.8},
    "V100 PCIe, NCCL (haohervchb/sglang-V100#2)": {4: 20.3},
}


def step_ms(one_gpu_ms: float, layers: int, gpus: int, latency_us: float) -> float:
    """Milliseconds of a decoding step on ``gpus`` GPUs."""
    return one_gpu_ms / gpus + (PER_LAYER * layers + BESIDE) * latency_us / 1e3


def predict(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each measured pair of steps (sequential, fused) and each published latency: predicted times and speed-up."""
    keys = ("mode", "batch", "context")
    steps = [c for c in cells if c["what"] == "decode" and "ms" in c]
    in_order = {tuple(c[k] for k in keys): c for c in steps if c["form"] == "sequential"}
    found = []
    for fused in (c for c in steps if c["form"] == "fused"):
        key = tuple(fused[k] for k in keys)
        order = in_order.get(key)
        if order is None:
            continue
        for link, by_gpus in LATENCIES_US.items():
            for gpus, us in by_gpus.items():
                times = {c["form"]: step_ms(c["ms"], c["layers"], gpus, us) for c in (order, fused)}
                line = dict(zip(keys, key, strict=True)) | {
                    "layers": fused["layers"],
                    "link": link,
                    "gpus": gpus,
                    "predicted_ms": times,
                }
                found.append(line | {"predicted_speedup": times["sequential"] / times["fused"]})
    return found


def table(lines: list[dict[str, Any]]) -> str:
    header = ("link", "GPUs", "mode", "batch", "context", "layers", "sequential ms", "fused ms", "speed-up, predicted")
    rows = [
        [c["link"], *(str(c[name]) for name in ("gpus", "mode", "batch", "context", "layers"))]
        + [f"{c['predicted_ms'][form]:.2f}" for form in ("sequential", "fused")]
        + [f"{c['predicted_speedup']:.2f} x"]
        for c in lines
    ]
    return PREDICTED + markdown(header, rows)


def summary(lines: list[dict[str, Any]]) -> str:
    """Of CUDA graphs at batch 1 and the shortest context: times in order and fused, and speed-up, by link and depth."""
    nvlink = [link for link in LATENCIES_US if "NVLink" in link]
    lines = [line for line in lines if line["mode"] == "graph" and line["batch"] == 1 and line["link"] in nvlink]
    lines = [line for line in lines if line["context"] == min(line["context"] for line in lines)]
    depths = sorted({line["layers"] for line in lines}, reverse=True)
    columns = [(link, depth) for link in nvlink for depth in depths]
    cells = {(line["gpus"], line["link"], line["layers"]): _times(line) for line in lines}
    rows = [[str(n), *(cells[n, *column] for column in columns)] for n in sorted({line["gpus"] for line in lines})]
    named = [f"{link.split(', ')[1].split(' (')[0]}, {depth} layers" for link, depth in columns]
    return PREDICTED + markdown(("GPUs", *named), rows)


def _times(line: dict[str, Any]) -> str:
    ms = line["predicted_ms"]
    return f"{ms['sequential']:.2f}, {ms['fused']:.2f}: {line['predicted_speedup']:.2f} x"


def command(options: argparse.Namespace) -> None:
    """Prints the table and, as the last line, one JSON object, from a file that ``infer --out`` wrote."""
    try:
        lines = [line for run in infer_table.read([options.file]) for line in predict(run["cells"])]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{options.file}: not the file that infer --out wrote ({error})") from None
    if not lines:
        raise UserError(f"{options.file}: no decoding measured both in order and fused; run infer with both forms")
    print(f"{table(lines)}\n\n{json.dumps({'predicted': lines})}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
