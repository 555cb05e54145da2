"""What pairing gains and costs: decoding speed of fused models beside their KL, NLL and tasks.

    PYTHONPATH=.:scripts python -m benchmarks.trade_off RUN [RUN ...] --out trade_off.png

Of each run folder: report.json, evaluation.json (scripts/evaluate_run.py, the group ``seven``) where there is one, and
infer.jsonl (scripts/bench.py infer --model RUN --modes eager,graph --parts decode --batches 1 --contexts 512
--rounds 3 --out RUN/infer.jsonl). Speed-ups are of the original in the same process. Prints a table; writes the plot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import infer_table
from benchmarks.table import cell, markdown, plot_of_runs, plt, save
from lp_train.errors import UserError
from lp_train.evaluation.plots import NAMES, PAIRED, RECOVERED

HEADER = ("depth", "CUDA graph", "eager", "NLL original", "recovered", "KL untuned", "recovered", "seven tasks kept")


def read(folder: Path) -> dict[str, Any]:
    """Depth, speed-up by mode, fidelity and what is kept of the seven tasks' mean (None: not measured), in per cent.

    ``interval``: the 95 % interval of what is kept, the original's mean taken as exact.
    """
    try:
        report = json.loads((folder / "report.json").read_text())
        runs = infer_table.read([folder / "infer.jsonl"])
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; the module's help says what writes it") from None
    speed: dict[str, float] = {}
    for measured in runs:
        cells = measured["cells"]
        if len({(c["batch"], c["context"]) for c in cells}) > 1:
            raise UserError(f"{folder}/infer.jsonl: several batches or contexts; measure one of each")
        fused = [c for c in cells if c["form"] == "fused" and c["what"] == "decode" and c["speedup"]]
        found = {c["mode"]: c["speedup"] for c in fused}
        speed = found if "graph" in found else speed  # of several runs the last
    if not speed:
        raise UserError(
            f"{folder}/infer.jsonl: no decoding of the fused model as a CUDA graph; run infer as in the help"
        )
    tasks = folder / "evaluation.json"
    groups = json.loads(tasks.read_text())["groups"] if tasks.exists() else {}
    seven = groups["seven"]["comparisons"]["recovered"] if "seven" in groups else None
    run = {"depth": report["effective_depth"], "speed": speed, "kept": None, **report}
    if seven:
        run["kept"] = seven["retained"]
        run["interval"] = [100 * (1 + end / seven["original"]) for end in seven["interval"]]
    return run


def row(run: dict[str, Any]) -> list[str]:
    speeds = [cell(run["speed"].get(mode), "{:.2f} x") for mode in ("graph", "eager")]
    nll = [f"{run[model]['nll']:.3f}" for model in ("sequential", "recovered")]
    kl = [f"{run[model]['kl']:.3f}" for model in ("paired", "recovered")]
    return [str(run["depth"]), *speeds, *nll, *kl, cell(run["kept"], "{:.1f} %")]


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """KL and kept tasks against the speed-up as a CUDA graph; the original is at 1."""
    figure, axes = plt.subplots(2, 1, figsize=(5.6, 5.4), sharex=True, layout="constrained")
    speeds = [1.0, *(run["speed"]["graph"] for run in runs)]
    for model, style, color in (("paired", "^--", PAIRED), ("recovered", "o-", RECOVERED)):
        kls = [0.0, *(run[model]["kl"] for run in runs)]
        axes[0].plot(speeds, kls, style, color=color, label=NAMES[model])
    axes[0].set(ylabel="KL to the original\n[nats per token]", ylim=(0, None))
    axes[0].legend(frameon=False)
    measured = [run for run in runs if run["kept"] is not None]
    bars = [[0.0, 0.0], *([run["kept"] - run["interval"][0], run["interval"][1] - run["kept"]] for run in measured)]
    places = [(1.0, 100.0), *((run["speed"]["graph"], run["kept"]) for run in measured)]
    axes[1].errorbar(*zip(*places, strict=True), yerr=[*zip(*bars, strict=True)], fmt="o-", color=RECOVERED, capsize=3)
    label = "seven tasks, mean\n[% of the original, 95 % interval]"
    axes[1].set(ylabel=label, xlabel="decoding speed, fused [x of the original]")
    for run, place in zip(measured, places[1:], strict=True):
        axes[1].annotate(f"depth {run['depth']}", place, (6, 4), textcoords="offset points")
    for axis in axes:
        axis.margins(x=0.12)
    save(figure, path)


def command(options: argparse.Namespace) -> None:
    runs = sorted(map(read, options.runs), key=lambda run: -run["depth"])
    print(markdown(HEADER, map(row, runs), left=()))
    plot(runs, options.out)


if __name__ == "__main__":
    plot_of_runs(__doc__, command)
