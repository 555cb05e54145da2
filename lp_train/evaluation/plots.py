"""The plots of a report. Each draws one figure that stays readable 360 pixels wide, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import EngFormatter, MaxNLocator

from lp_train.evaluation.page import Plot

ORIGINAL, PAIRED, RECOVERED = COLOURS = ("C0", "C1", "C2")
STYLES = {"sequential": (ORIGINAL, "s"), "paired": (PAIRED, "^"), "recovered": (RECOVERED, "o")}
NAMES = {"sequential": "original", "paired": "untuned pairs", "recovered": "recovered"}
WIDTH = 5.6  # inches: at 10 points text is still some 9 pixels high where the plot is 360 pixels wide
STEPS_PER_LINE = 12


def _theme(page: str, ink: str, line: str, colours: Sequence[str]) -> dict[str, Any]:
    """Colours that also differ for the colour-blind (Okabe and Ito), bright on dark pages."""
    inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    pages = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {
        **dict.fromkeys(inks, ink),
        **dict.fromkeys(pages, page),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), line),
        "axes.prop_cycle": cycler(color=colours),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 10,
        "legend.frameon": False,
    }


LIGHT = _theme("#ffffff", "#1c2230", "#c3c8d1", ("#009e73", "#d55e00", "#0072b2"))
DARK = _theme("#15181e", "#e4e7ec", "#4a515e", ("#2ccf9f", "#ff8c42", "#56b4e9"))


def plot(folder: Path, name: str, alt: str, draw: Callable[[], Figure]) -> Plot:
    """Draws ``plots/NAME.png`` in ``folder``, whole or not at all, and once more for dark pages."""
    drawn = []
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(dict[Any, Any](theme)):
            draw().savefig(buffer := io.BytesIO(), dpi=160)
            drawn.append(buffer.getvalue())
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    (temporary := folder / "plots" / f".{name}.png").write_bytes(drawn[0])
    temporary.rename(folder / "plots" / f"{name}.png")
    return Plot(f"plots/{name}.png", drawn[1], alt)


def _panels(number: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(number, 1, squeeze=False, **options)[:, 0])
    for axis in axes:
        axis.grid(alpha=0.5)
        axis.set_axisbelow(True)
    return figure, axes


def model_picture(plan: Mapping[str, Any]) -> Figure:
    """The layers in the order they run, pairs side by side; the text is read line by line, as the model runs."""
    second = {first: other for first, other in plan["pairs"]}
    steps = [[k, second[k]] if k in second else [k] for k in range(plan["num_layers"]) if k not in second.values()]
    lines = [steps[i : i + STEPS_PER_LINE] for i in range(0, len(steps), STEPS_PER_LINE)]
    figure = Figure(figsize=(WIDTH, 0.75 * len(lines) + 0.35), layout="constrained")
    axis, edge = figure.subplots(), matplotlib.rcParams["axes.edgecolor"]
    for row, line in enumerate(lines):
        y = -2.9 * row
        axis.annotate("", (len(line) + 0.25, y), (-0.45, y), arrowprops={"arrowstyle": "->", "color": edge})
        for x, layers in enumerate(line):
            for layer, offset in zip(layers, (0.58, -0.58) if len(layers) > 1 else (0.0,), strict=True):
                _layer_box(axis, x, y + offset, str(layer), RECOVERED if len(layers) > 1 else ORIGINAL)
    axis.set(xlim=(-0.5, STEPS_PER_LINE + 0.3), ylim=(-2.9 * (len(lines) - 1) - 1.25, 1.25))
    axis.axis("off")
    axis.set_title(f"{plan['num_layers']} layers in {len(steps)} steps: {len(second)} pairs run side by side")
    return figure


def _layer_box(axis: Axes, x: float, y: float, text: str, colour: str) -> None:
    box: dict[str, Any] = {"boxstyle": "round,pad=0.02,rounding_size=0.12", "facecolor": colour, "edgecolor": "none"}
    axis.add_patch(FancyBboxPatch((x + 0.08, y - 0.46), 0.74, 0.92, **box))
    ink = matplotlib.rcParams["axes.facecolor"]
    axis.text(x + 0.45, y, text, ha="center", va="center", color=ink, fontsize=9)


def evaluations(history: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The held-out figures by step; where a resumed run made a step again, its last."""
    return {line["step"]: line for line in history if "eval_kl" in line}


def recovery(report: Mapping[str, Any], history: Sequence[Mapping[str, Any]], tokens_per_step: int) -> Figure:
    """Held-out NLL and KL over training tokens, between the original and the untrained pairs."""
    figure, axes = _panels(2, 5.4, sharex=True)
    found = evaluations(history)
    for axis, key, label in zip(axes, ("nll", "kl"), ("NLL", "KL to the original"), strict=True):
        points = [(0, report["paired"][key])]
        points += [(step * tokens_per_step, line[f"eval_{key}"]) for step, line in sorted(found.items())]
        axis.axhline(report["paired"][key], color=PAIRED, linestyle="--", label="untuned pairs")
        axis.plot(*zip(*points, strict=True), marker="o", color=RECOVERED, label="in training")
        axis.axhline(report["sequential"][key], color=ORIGINAL, linestyle=":", label="original")
        won = report["recovery"][key]
        axis.set_title(f"{label}: {'gap too small to judge' if won is None else f'{won:.0%} won back'}")
        axis.set_ylabel("nats per token")
    axes[0].legend()
    axes[1].set_xlabel("training tokens")
    axes[1].xaxis.set_major_formatter(EngFormatter())
    return figure


def drift(pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Relative error of the residual stream after each pair, before and after recovery."""
    figure, (axis,) = _panels(1, 3.2)
    labels = ["+".join(map(str, row["pair"])) for row in pairs]
    for model in ("paired", "recovered"):
        if values := [row[model] for row in pairs if row.get(model) is not None]:
            colour, marker = STYLES[model]
            axis.plot(labels[: len(values)], values, color=colour, marker=marker, label=NAMES[model])
    axis.tick_params(axis="x", rotation=45 if len(labels) > 6 else 0)
    axis.set(xlabel="after layers", ylabel="relative error", title="Drift of the residual stream from the original's")
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def positions(buckets: Sequence[Mapping[str, Any]], unit: str) -> Figure:
    """KL and top-1 agreement by position in the document."""
    figure, axes = _panels(2, 5.4, sharex=True)
    labels = [f"{bucket['from']}–{bucket['to']}" for bucket in buckets]
    for axis, key, label in zip(axes, ("kl", "top1_agreement"), ("KL, nats per token", "top-1 agreement"), strict=True):
        _lines(axis, labels, [bucket["models"] for bucket in buckets], key)
        axis.set_ylabel(label)
    axes[0].legend()
    axes[0].set_title("Divergence from the original by position")
    axes[1].tick_params(axis="x", rotation=45)
    axes[1].set_xlabel(unit)
    return figure


def _lines(axis: Axes, labels: Sequence[str], rows: Sequence[Mapping[str, Any]], key: str) -> None:
    for model in ("paired", "recovered"):
        points = [(x, row[model][key]) for x, row in zip(labels, rows, strict=True) if model in row]
        if points:
            colour, marker = STYLES[model]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=NAMES[model])


def domains(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """KL on each domain's text, before and after recovery."""
    figure, (axis,) = _panels(1, 1.2 + 0.45 * len(rows))
    for offset, model in ((-0.2, "paired"), (0.2, "recovered")):
        bars = [(i + offset, row["models"][model]["kl"]) for i, row in enumerate(rows) if model in row["models"]]
        if bars:
            places, values = zip(*bars, strict=True)
            axis.barh(places, values, height=0.38, color=STYLES[model][0], label=NAMES[model])
    axis.set_yticks(range(len(rows)), [row["domain"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel="nats per token", title="KL to the original by domain")
    axis.legend()
    return figure


def tasks(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Difference to the original in points of each task or group, with its 95 % interval."""
    figure, (axis,) = _panels(1, 1.3 + 0.45 * len(found))
    for offset, model in ((-0.15, "paired"), (0.15, "recovered")):
        rows = [(i, c) for i, task in enumerate(found.values()) if (c := task["comparisons"].get(model))]
        if not rows:
            continue
        middle = [100 * c["difference"] for _, c in rows]
        ends = [[100 * abs(c["interval"][end] - c["difference"]) for _, c in rows] for end in (0, 1)]
        colour, marker = STYLES[model]
        options: dict[str, Any] = {"color": colour, "fmt": marker, "capsize": 3, "label": NAMES[model]}
        axis.errorbar(middle, [i + offset for i, _ in rows], xerr=ends, **options)
    axis.axvline(0, color=ORIGINAL, linestyle=":", label=NAMES["sequential"])
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set(xlabel="points, with 95 % interval", title="Tasks: difference to the original")
    axis.legend()
    return figure


def by_depth(rows: Sequence[Mapping[str, Any]], label: str) -> Figure:
    """Figures of several runs over effective depth: rows of ``depth``, ``model``, ``value``, ``error``."""
    figure, (axis,) = _panels(1, 3.6)
    for model, (colour, marker) in STYLES.items():
        points = sorted((row["depth"], row["value"], row["error"]) for row in rows if row["model"] == model)
        if points:
            depth, value, error = zip(*points, strict=True)
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "linestyle": "none",
                "capsize": 3,
                "label": NAMES[model],
            }
            axis.errorbar(depth, value, yerr=error if any(error) else None, **style)
    axis.set(xlabel="effective depth, layers", ylabel=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure
