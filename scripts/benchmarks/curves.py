"""Held-out KL over training tokens, of runs side by side.

    PYTHONPATH=.:scripts python -m benchmarks.curves runs/plain runs/healed --out curves.png

Of each run folder: metrics.jsonl and resolved_config.yaml.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from benchmarks.table import plot_of_runs, plt, save
from lp_train.errors import UserError


def points(folder: Path) -> list[tuple[float, float]]:
    """(million tokens, KL in nats per token) of each evaluation during training."""
    try:
        per_step = yaml.safe_load((folder / "resolved_config.yaml").read_text())["train"]["global_batch_tokens"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; name the folder of a run that trained") from None
    return [(line["step"] * per_step / 1e6, line["eval_kl"]) for line in lines if "eval_kl" in line]


def command(options: argparse.Namespace) -> None:
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for folder, style in zip(options.runs, ("^--", "o-", "s:", "d-."), strict=False):
        found = points(folder)
        axis.plot(*zip(*found, strict=True), style, label=folder.name)
        print(f"{folder.name}: " + ", ".join(f"{kl:.4f} at {tokens:.1f} M" for tokens, kl in found))
    axis.set(xlabel="training tokens [M]", ylabel="KL to the original\n[nats per token]", ylim=(0, None))
    axis.legend(frameon=False)
    save(figure, options.out)


if __name__ == "__main__":
    plot_of_runs(__doc__, command)
