"""Figures of the inference benchmark as text and as a plot.

    PYTHONPATH=.:scripts python -m benchmarks.infer_table FILE.jsonl [FILE.jsonl ...]

prints the tables of files that ``infer --out`` wrote, and as the last line one JSON list: runs of one case, machine and
code are one table; a ratio is only inside one round of one call.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.table import markdown, plt

SAME = ("device", "world", "machine", "versions", "commit", "code")
KEY = ("mode", "what", "batch", "context")
SIZES = ("shape", "model", "dtype", "tokens", "layers", "vocab")
RATES = ("tokens_per_second", "gb_per_second", "of_copy")
SPOKEN = {
    "graph": "CUDA graph",
    "compile": "compiled",
    "frozen": "compiled, frozen",
    "tuned": "compiled, tuned",
    "eager": "eager",
}


def merged(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell for each that was measured: of several rounds the median time, and ``rounds_ms`` the time of each.

    ``speedup``: how many times as fast as the sequential model in the same mode and round, the median over the rounds,
    so with several rounds not quite the ratio of two medians; None where it was not run.
    """
    measured: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = {}
    for cell in cells:
        rounds = measured.setdefault(tuple(cell.get(name) for name in ("form", "pairs", *KEY)), {})
        rounds[cell.get("round", len(rounds))] = cell  # lines of before have no round
    found = [_median(list(rounds.values())) for rounds in measured.values()]
    alone = {key[2:]: rounds for key, rounds in measured.items() if key[0] == "sequential"}
    for (key, rounds), cell in zip(measured.items(), found, strict=True):
        both = [(alone.get(key[2:], {}).get(number, {}), ours) for number, ours in rounds.items()]
        ratios = [a["ms"] / b["ms"] for a, b in both if "ms" in a and "ms" in b]
        cell["speedup"] = statistics.median(ratios) if ratios else None
    return found


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    times = [cell["ms"] for cell in rounds if "ms" in cell]
    if not times:
        return {**rounds[-1], "rounds_ms": []}
    cell = next(cell for cell in rounds if "ms" in cell)
    ms = statistics.median(times)
    rates = {name: cell[name] * cell["ms"] / ms for name in RATES if cell.get(name) is not None}
    return {**cell, **rates, "ms": ms, "rounds_ms": times}


def line(cell: dict[str, Any]) -> str:
    return f"{_name(cell)} {cell['mode']} {cell['what']} batch {cell['batch']} context {cell['context']}: " + (
        cell.get("error") or f"{cell['ms']:.2f} ms, {cell['tokens_per_second']:,.0f} tokens/s"
    )


def _name(cell: dict[str, Any]) -> str:
    return cell["form"] if cell["form"] == "sequential" else f"{cell['form']}, {cell['layers']} layers"


def table(found: dict[str, Any]) -> str:
    case = found["case"]
    head = (
        f"{case['shape'] or case['model']}, {case['dtype']}, {found['world']} process(es); {found['device']} "
        f"({found['machine']}), copy {found['copy_gb_per_second']:,.0f} GB/s; torch {found['versions']['torch']}, "
        f"transformers {found['versions']['transformers']}, {found['date']}, commit {found['commit']}, "
        f"code {found['code']}"
    )
    header = ("what", "mode", "batch", "context", "form", "ms", "tokens/s", "GB/s", "of copy", "speed-up")
    cells = sorted(found["cells"], key=lambda c: tuple(c[name] for name in ("what", *KEY[:1], *KEY[2:])))
    return f"{head}\n\n{markdown(header, map(_row, cells), left=(0, 1, 4))}"


def _row(cell: dict[str, Any]) -> list[str]:
    start = [cell["what"], cell["mode"], str(cell["batch"]), str(cell["context"]), _name(cell)]
    if "error" in cell:
        return [*start, cell["error"], *["not run"] * 4]
    speedup = "not run" if cell["speedup"] is None else f"{cell['speedup']:.2f} x"
    bandwidth = (
        ["", ""] if cell["gb_per_second"] is None else [f"{cell['gb_per_second']:,.0f}", f"{cell['of_copy']:.0%}"]
    )
    return [*start, f"{cell['ms']:.2f}", f"{cell['tokens_per_second']:,.0f}", *bandwidth, speedup]


def plot(found: dict[str, Any], path: Path) -> None:
    """The speed-up of the fused model over the batch, a line for each depth, mode and context of decoding."""
    cells = [c for c in found["cells"] if c["form"] == "fused" and c["what"] == "decode" and c["speedup"]]
    figure, axes = plt.subplots(figsize=(6, 4))
    key = itemgetter("layers", "mode", "context")
    for layers, mode, context in sorted({key(c) for c in cells}):
        points = sorted((c["batch"], c["speedup"]) for c in cells if key(c) == (layers, mode, context))
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{layers} layers, {mode}, context {context:,}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch [sequences]")
    axes.set_ylabel("speed-up of decoding [fused / sequential]")
    axes.set_title(f"{found['case']['shape'] or found['case']['model']}, {found['device']}")
    if cells:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """What :func:`benchmarks.infer.run` returned, from its lines; a cell measured again is one more round of it."""
    runs: dict[str, dict[str, Any]] = {}
    for line in (line for path in paths for line in path.read_text().splitlines()):
        found = json.loads(line)
        cell, case = found.pop("cell"), found["case"]
        key = json.dumps([*(found[name] for name in SAME), *(case[name] for name in SIZES)])
        runs.setdefault(key, {**found, "cells": []})["cells"].append(cell)
    return [{**found, "cells": merged(found["cells"])} for found in runs.values()]


if __name__ == "__main__":
    everything = read([Path(name) for name in sys.argv[1:]])
    print("\n\n".join(map(table, everything)), json.dumps(everything), sep="\n\n")
