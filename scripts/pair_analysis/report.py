"""What ``select_pairs.py`` writes: tables, plots and figures of one configuration, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lp_train.evaluation.page import Table
from lp_train.evaluation.plots import plot
from lp_train.selection import store
from lp_train.selection.greedy import Step
from pair_analysis.sweep import Sweep

FIGURES, PAGE = "selection.json", "selection.md"


class Report:
    """The folder of one configuration's choice: ``selection.json``, ``selection.md`` and ``plots/``. Sections of an
    earlier call stay if they are of the same model, text and versions.

    Raises:
        UserError: what is in the folder is of another model.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about, self.sections = folder, about, dict[str, Any]()
        if earlier := store.read(folder / FIGURES, about):
            self.sections = earlier["sections"]

    def add(self, name: str, title: str, table: Table, figures: Any, pictures: dict[str, Callable[[], Figure]]) -> None:
        """A section with its table and plots; everything is on disk afterwards."""
        links = [plot(self.folder, key, title, draw) for key, draw in pictures.items()]
        text = "\n\n".join([f"## {title}", str(table), *links])
        self.sections[name] = {"text": text, "figures": figures}
        store.write(self.folder / FIGURES, self.about, {"sections": self.sections})
        texts = [section["text"] for section in self.sections.values()]
        (self.folder / PAGE).write_text("\n\n".join(["# Which layers to pair", *texts]) + "\n")


def sweep_table(swept: Sweep) -> Table:
    """The best window of each number of pairs."""
    rows = []
    for pairs, start in swept.best().items():
        cost, window = swept.costs[start, pairs], f"{start}:{start + 2 * pairs}"
        gap = cost.nll - swept.original_nll
        rows.append([str(pairs), str(swept.num_layers - pairs), window, f"{gap:.4f}", f"{cost.kl:.4f}"])
    return Table(["pairs", "depth", "best window", "NLL above the original", "KL"], rows)


def greedy_table(path: Sequence[Step], num_layers: int) -> Table:
    """The plan after each pair: the one that joined it, and what the whole costs."""
    rows = [
        [str(n), str(num_layers - n), f"{step.first}+{step.first + 1}", f"{step.gap:.4f}", f"{step.kl:.4f}"]
        for n, step in enumerate(path, start=1)
    ]
    return Table(["pairs", "depth", "added", "NLL above the original", "KL"], rows)


def score_table(correlations: dict[str, float]) -> Table:
    """How well each cheap score orders the pairs by what they cost."""
    rows = [[name, f"{value:.2f}"] for name, value in correlations.items()]
    return Table(["score", "rank correlation with the pair's KL in the sweep"], rows)


def compare_table(found: dict[str, Any]) -> Table:
    """What sharing states is worth: seconds for all windows on the tokens of one batch."""
    ways = {
        "sweep": (found["sweep_seconds"], 1.0),
        "whole forwards, the original's states given": (found["whole_forward_seconds"], found["whole_forward_ratio"]),
        "evaluation, the original run each time": (found["evaluation_seconds"], found["evaluation_ratio"]),
    }
    rows = [[way, f"{seconds:.1f}", f"{ratio:.1f}x"] for way, (seconds, ratio) in ways.items()]
    return Table([f"{found['windows']} windows, {found['tokens']:,} tokens", "seconds", "to the sweep"], rows)


def intervention_table(found: dict[str, dict[tuple[int, int], float]]) -> Table:
    """The cheapest window of each kind, at the lengths 2, 4, 8 and 16."""
    lengths = [n for n in (2, 4, 8, 16) if any(n == m for _, m in found["pairs"])]
    rows = []
    for kind, grid in found.items():
        best = [min((nll, start) for (start, n), nll in grid.items() if n == length) for length in lengths]
        cells = [f"{nll:.3f} ({start}:{start + n})" for (nll, start), n in zip(best, lengths, strict=True)]
        rows.append([kind, *cells])
    return Table(["NLL above the original", *(f"{n} layers" for n in lengths)], rows)
