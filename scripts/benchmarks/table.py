"""Figures of the benchmarks as text and as a plot. A cell that was not measured says "not run"."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lp_train.errors import exit_code

AXES = {
    "seq": "sequence length [tokens]",
    "vocab": "vocabulary [× 1,024 entries]",
    "depth": "first pair [share of the depth]",
}


def plot_of_runs(description: str | None, command: Callable[[argparse.Namespace], None]) -> None:
    """The command line of a program that draws run folders (``runs``) into a PNG (``out``), and the program's end."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="the plot, a PNG")
    options = parser.parse_args()
    sys.exit(exit_code(lambda: command(options)))


def save(figure: Figure, path: Path) -> None:
    """Writes a plot with a light grid in each panel, without a frame."""
    for axis in figure.axes:
        axis.grid(alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def cell(value: float | None, form: str) -> str:
    return "not run" if value is None else form.format(value)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table; ``left``: the columns that hold text, all others are numbers."""
    lines = [header, ["---" if i in left else "---:" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def training(found: dict[str, Any]) -> str:
    """The variants of one case, with what was measured above them."""
    case = found["case"]
    head = (
        f"{case['shape']}, {found['layers']} layers, vocabulary {found['vocabulary']:,}, {case['dtype']}; batch "
        f"{found['batch']} x {found['seq']:,} ({case['documents']} document(s) a row); {len(found['pairs'])} pairs "
        f"from {found['pairs'][0][0]}, LoRA r={case['rank']}; {case['steps']} steps after {case['warmup']}\n"
        f"{found['device']} ({found['machine']}), torch {found['versions']['torch']}, transformers "
        f"{found['versions']['transformers']}, {found['date']}, commit {found['commit']}, code {found['code']}\n"
        f"bf16 matrix product: {cell(found['matmul_tflops'], '{:.0f} TFLOP/s')}. MFU and its share of that count the "
        f"{found['step_tflop']:.3g} TFLOP that our step needs, in every row."
    )
    header = ("variant", "tokens/s", "ms/step", "median", "peak GiB", "TFLOP/s", "MFU", "of matmul", "ours is")
    rows = [_variant(name, row) for name, row in found["variants"].items()]
    return f"{head}\n\n{markdown([*header, 'recompiled', 'loss'], rows)}"


def harness(found: dict[str, Any]) -> str:
    head = (
        f"{found['config']}, {found['dtype']}; {found['device']} ({found['machine']}), torch "
        f"{found['versions']['torch']}, transformers {found['versions']['transformers']}, {found['date']}, commit "
        f"{found['commit']}, code {found['code']}"
    )
    header = ("task", "items", "tokens", "harness tokens/s", "of bare decoder", "of bare with logits", "paired cost")
    rows = [
        [
            name,
            f"{row['items']:,}",
            f"{row['tokens']:,}",
            f"{row['harness']:,.0f}",
            f"{row['of_decoder']:.0%}",
            f"{row['of_logits']:.0%}",
            f"{row['paired_over_sequential']['harness']:.2f} x",
        ]
        for name, row in found["tasks"].items()
    ]
    return f"{head}\n\n{markdown(header, rows)}"


def _variant(name: str, row: dict[str, Any]) -> list[str]:
    label = f"{name}: {row['what']}"
    if "error" in row:
        return [label, row["error"], *["not run"] * 9]
    return [
        label,
        f"{row['tokens_per_second']:,.0f}",
        f"{row['ms_per_step']:.1f}",
        f"{row['ms_median']:.1f}",
        cell(row["peak_gib"], "{:.1f}"),
        f"{row['tflops']:.3g}" if name == "ours" else "",
        cell(row["mfu"], "{:.1%}"),
        cell(row["of_matmul"], "{:.1%}"),
        cell(row["ours_is"], "{:.2f} x"),
        str(row["recompilations"]),
        f"{row['loss']:.4g}",
    ]


def sweep(lines: list[dict[str, Any]]) -> str:
    """One row per value: ours, the baseline, how many times as fast."""
    rows = []
    for line in lines:
        ours, theirs = (line["us_per_token"].get(name) for name in ("ours", line["baseline"]))
        ratio = theirs / ours if ours and theirs else None
        values = [cell(ours, "{:.2f}"), cell(theirs, "{:.2f}"), cell(ratio, "{:.2f} x")]
        rows.append([f"{line['axis']} {line['value']:g}", *values])
    return markdown(["cell", "ours [µs/token]", "baseline [µs/token]", "ours is"], rows)


def plot_sweep(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time per token over sequence, vocabulary and first pair; ours against the baseline."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        here = [line for line in lines if line["axis"] == axis]
        ticks = [line["value"] / (1024 if axis == "vocab" else 1) for line in here]
        for name in sorted({name for line in here for name in line["us_per_token"]}, reverse=True):
            points = [line["us_per_token"].get(name) for line in here]
            panel.plot(range(len(here)), points, marker="o", label="ours" if name == "ours" else f"baseline {name}")
        panel.set_xticks(range(len(here)), [f"{tick:g}" for tick in ticks])
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time per token [µs]")
    panels[0].set_ylim(bottom=0)
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
            break
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def losses(found: dict[str, Any]) -> str:
    """Head losses: a row for each loss and way to compute it."""
    rows = [
        [loss, way, *([entry["error"], *["not run"] * 2] if "error" in entry else _loss_cells(entry))]
        for loss, ways in found["losses"].items()
        for way, entry in ways.items()
    ]
    head = (
        f"{found['rows']:,} rows, width {found['width']:,}, vocabulary {found['vocab']:,}, {found['dtype']}; forward "
        f"and backward; {found['device']}, torch {found['versions']['torch']}, {found['date']}, "
        f"commit {found['commit']}\ngradient error: against the plain formula in float32 on {found['checked']} rows"
    )
    return f"{head}\n\n{markdown(['loss', 'way', 'ms', 'extra GiB', 'gradient error'], rows)}"


def _loss_cells(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['ms']:.1f}", cell(entry["extra_gib"], "{:.2f}"), f"{entry['gradient_error']:.1e}"]
