"""The plots of a choice: what windows cost by position and length, and the greedy path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lp_train.evaluation.plots import PAIRED, RECOVERED, STYLES
from lp_train.selection.greedy import Step
from pair_analysis.sweep import Sweep

WIDTH = 7.2  # inches
FLOOR, CEILING = 0.01, 10.0  # nats per token: below is noise of few tokens, above it guesses (log of the vocabulary)
COLOURS = "viridis_r"  # dark is dear; its lightness alone tells the order
Grid = Mapping[tuple[int, int], float]  # by (start, length)


def heat_map(swept: Sweep) -> Figure:
    """NLL and KL of every window: position to the right, length upwards, on one logarithmic scale."""
    grids = {
        "NLL above the original": {place: cost.nll - swept.original_nll for place, cost in swept.costs.items()},
        "KL to the original": {place: cost.kl for place, cost in swept.costs.items()},
    }
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    axes = list(figure.subplots(2, 1))
    for axis, (title, grid) in zip(axes, grids.items(), strict=True):
        _draw(axis, grid, _scale(grids))
        for length, start in _cheapest(grid).items():
            axis.plot(start, length, marker="o", ms=5, mfc=PAIRED, mec="black", mew=0.8)
            text = f"{grid[start, length]:.2f}"
            axis.annotate(text, (swept.num_layers - 0.7, length), va="center", fontsize=8, annotation_clip=False)
        axis.set(title=title, ylabel="pairs in the window")
        axis.text(swept.num_layers - 0.7, max(n for _, n in grid) + 0.9, "best", fontsize=8, va="center")
    axes[-1].set_xlabel("first layer of the window")
    _colourbar(figure, axes, "nats per token", pad=0.09, shrink=0.7)
    return figure


def intervention_map(found: Mapping[str, Grid]) -> Figure:
    """NLL above the original of every window, one panel for each kind of intervention, on one logarithmic scale."""
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    axes = figure.subplots(3, 2).flatten()
    for axis, (kind, grid) in zip(axes, found.items(), strict=False):
        _draw(axis, grid, _scale(found), ticks=8)
        axis.set(title=kind, xlabel="first layer", ylabel="layers in the window")
    lines = axes[len(found)]
    for (kind, grid), marker in zip(found.items(), "so.^D", strict=True):  # drop's circles show around merge's points
        best = _cheapest(grid)
        cheapest = [max(grid[start, n], FLOOR) for n, start in best.items()]
        lines.plot(list(best), cheapest, marker=marker, ms=5, mfc="none", lw=1, label=kind)
    lines.set(
        title="cheapest window of each length", xlabel="layers in the window", ylabel="nats per token", yscale="log"
    )
    lines.legend(fontsize=8, frameon=False)
    _colourbar(figure, list(axes), "NLL above the original, nats per token", shrink=0.5)
    return figure


def path(steps: Sequence[Step], swept: Sweep | None) -> Figure:
    """KL of the greedy plans by their number of pairs, and of the best windows where they are known."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    kls = [step.kl for step in steps]
    axis.plot(range(1, len(kls) + 1), kls, **{**STYLES["recovered"], "color": RECOVERED, "label": "greedy"})
    for number, step in enumerate(steps, start=1):
        place: dict[str, Any] = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axis.annotate(str(step.first), (number, step.kl), **place)
    if swept:
        best = {n: start for n, start in swept.best().items() if n <= len(kls)}
        costs = [swept.costs[start, n].kl for n, start in best.items()]
        axis.plot(list(best), costs, **{**STYLES["paired"], "label": "best window"})
    axis.set(
        yscale="log", xlabel="pairs (the number below: first layer of the added pair)", ylabel="KL, nats per token"
    )
    axis.margins(0.08, 0.15)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.5)
    axis.legend()
    return figure


def _cheapest(grid: Grid) -> dict[int, int]:
    """The start of the cheapest window of each length."""
    return {n: min((s for s, m in grid if m == n), key=lambda s: grid[s, n]) for n in sorted({n for _, n in grid})}


def _scale(grids: Mapping[str, Grid]) -> LogNorm:
    values = [value for grid in grids.values() for value in grid.values()]
    return LogNorm(FLOOR, min(max(*values, 2 * FLOOR), CEILING))


def _colourbar(figure: Figure, axes: list[Axes], label: str, **options: Any) -> None:
    bar = figure.colorbar(axes[0].collections[0], ax=axes, label=label, extend="both", **options)
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10) if tick <= bar.ax.get_ylim()[1]]
    bar.ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()


def _draw(axis: Axes, grid: Grid, norm: LogNorm, ticks: int = 15) -> None:
    starts, lengths = (np.arange(min(part), max(part) + 1) for part in zip(*grid, strict=True))
    cells = np.full((len(lengths), len(starts)), np.nan)
    for (start, length), value in grid.items():
        cells[length - lengths[0], start - starts[0]] = max(value, FLOOR)
    axis.pcolormesh(starts, lengths, np.ma.masked_invalid(cells), norm=norm, cmap=COLOURS, edgecolors="white", lw=0.4)
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(MaxNLocator(integer=True, nbins=ticks))
