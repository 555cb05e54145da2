"""The plots of evaluations: tasks against the original, several runs over effective depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lp_train.evaluation.plots import STYLES, legend, panels


def tasks(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Difference to the original in points of each task or group, with its 95 % interval."""
    figure, (axis,) = panels(1, 1.3 + 0.45 * len(found))
    for offset, model in ((-0.15, "paired"), (0.15, "recovered")):
        if rows := [(i, c) for i, task in enumerate(found.values()) if (c := task["comparisons"].get(model))]:
            middle = [100 * c["difference"] for _, c in rows]
            ends = [[100 * abs(c["interval"][end] - c["difference"]) for _, c in rows] for end in (0, 1)]
            style = {**STYLES[model], "linestyle": "none", "capsize": 3}
            axis.errorbar(middle, [i + offset for i, _ in rows], xerr=ends, **style)
    axis.axvline(0, **{**STYLES["sequential"], "marker": ""})
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set(xlabel="percentage points, with 95 % interval", title="Tasks: difference to the original")
    legend(axis)
    return figure


def by_depth(rows: Sequence[Mapping[str, Any]], label: str) -> Figure:
    """Figures of several runs over effective depth: rows of ``name``, ``depth``, ``model``, ``value`` and ``interval``
    (two distances). Lines go from the original through the means at each depth."""
    figure, (axis,) = panels(1, 4.0)
    original = [row for row in rows if row["model"] == "sequential"]
    for model, style in STYLES.items():
        of_model = [row for row in rows if row["model"] == model]
        ends = np.array([row["interval"] for row in of_model]).T
        points = [row["depth"] for row in of_model], [row["value"] for row in of_model]
        axis.errorbar(*points, yerr=ends if ends.any() else None, **{**style, "linestyle": "none", "capsize": 3})
        depths = sorted({row["depth"] for row in of_model + original})
        means = [np.mean([r["value"] for r in of_model + original if r["depth"] == depth]) for depth in depths]
        axis.plot(depths, means, **{**style, "marker": "", "label": None, "alpha": 0.6})
        for row in of_model if model == "recovered" else ():
            place: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(row["name"], (row["depth"], row["value"] + row["interval"][1]), **place)
    axis.set(xlabel="effective depth, layers", ylabel=label)
    axis.margins(0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axis)
    return figure
