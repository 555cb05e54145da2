"""The plots of a report. Each draws a figure that stays readable 360 pixels wide and without colour."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

NAMES = {"sequential": "original", "paired": "untuned pairs", "recovered": "recovered"}
# told apart by the colour-blind (Okabe and Ito) and by lightness
ORIGINAL, PAIRED, RECOVERED = "#6b7484", "#e69f00", "#0072b2"
STYLES: dict[str, dict[str, Any]] = {
    "sequential": {"color": ORIGINAL, "marker": "s", "linestyle": ":", "label": NAMES["sequential"]},
    "paired": {"color": PAIRED, "marker": "^", "linestyle": "--", "label": NAMES["paired"]},
    "recovered": {"color": RECOVERED, "marker": "o", "label": NAMES["recovered"]},
}
THEME: dict[Any, Any] = {
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.titlesize", "font.size"), 10),
}
WIDTH = 5.6  # inches: at 10 points text is still some 9 pixels high where the plot is 360 pixels wide


def plot(folder: Path, name: str, alt: str, draw: Callable[[], Figure]) -> str:
    """Draws ``plots/NAME.png`` in ``folder``; returns its Markdown."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(THEME):
        draw().savefig(folder / "plots" / f"{name}.png", dpi=160)
    return f"![{alt}](plots/{name}.png)"


def panels(number: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(number, 1, squeeze=False, **options)[:, 0])
    for axis in axes:
        axis.grid(alpha=0.5)
        axis.set_axisbelow(True)
    return figure, axes


def legend(axis: Axes) -> None:
    """Below all panels, where it covers nothing."""
    assert isinstance(axis.figure, Figure)
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def recovery(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], tokens_per_step: int) -> Figure:
    """Held-out NLL and KL over training tokens, between the original and the untrained pairs."""
    figure, axes = panels(2, 5.4, sharex=True)
    found = {line["step"]: line for line in history if "eval_kl" in line}  # of a step made again, the last
    for axis, key, label in zip(axes, ("nll", "kl"), ("NLL", "KL to the original"), strict=True):
        points = [(0, report["paired"][key])]
        points += [(step * tokens_per_step, line[f"eval_{key}"]) for step, line in sorted(found.items())]
        for model in ("paired", "sequential"):
            axis.axhline(report[model][key], **{**STYLES[model], "marker": ""})
        axis.plot(*zip(*points, strict=True), **{**STYLES["recovered"], "label": "in training"})
        won = report["recovery"][key]
        back = "gap too small to judge" if won is None else f"{won:.0%} of the gap won back"
        axis.set(title=f"{label}: {back}", ylabel="nats per token")
    legend(axes[0])
    axes[1].set_xlabel("training tokens")
    axes[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def drift(pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Relative error of the residual stream after each pair, before and after recovery."""
    figure, (axis,) = panels(1, 3.2)
    labels = ["+".join(map(str, row["pair"])) for row in pairs]
    _lines(axis, labels, pairs, lambda row, model: row[model])
    axis.tick_params(axis="x", rotation=45 if len(labels) > 8 else 0)
    axis.set(xlabel="after layers", ylabel="‖h − original‖ / ‖original‖", title="Drift of the residual stream")
    axis.set_ylim(bottom=0)
    legend(axis)
    return figure


def positions(buckets: Sequence[Mapping[str, Any]]) -> Figure:
    """KL and top-1 agreement by position in the document."""
    figure, axes = panels(2, 5.4, sharex=True)
    labels = [f"{b['from']}–{b['to']}" if b["to"] else f"{b['from']}–" for b in buckets]
    for axis, key, label in zip(axes, ("kl", "top1_agreement"), ("KL, nats per token", "top-1 agreement"), strict=True):
        _lines(axis, labels, [bucket["models"] for bucket in buckets], lambda row, model: row[model][key])  # noqa: B023
        axis.set_ylabel(label)
    legend(axes[0])
    axes[0].set_title("Divergence from the original by position in the document")
    axes[1].tick_params(axis="x", rotation=30)
    axes[1].set_xlabel("tokens of context")
    return figure


def _lines(axis: Axes, labels: Sequence[str], rows: Sequence[Mapping[str, Any]], value: Callable[..., float]) -> None:
    for model in ("paired", "recovered"):
        if points := [(x, value(row, model)) for x, row in zip(labels, rows, strict=True) if model in row]:
            axis.plot(*zip(*points, strict=True), **STYLES[model])
