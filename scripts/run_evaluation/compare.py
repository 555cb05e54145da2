"""Several runs side by side: tables of all, and what they keep over effective depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lp_train.evaluation import page
from lp_train.evaluation import report as reports
from lp_train.evaluation.plots import plot
from lp_train.evaluation.tables import fidelity
from run_evaluation import plots
from run_evaluation.pages import document_of
from run_evaluation.tables import compared_fidelity, task_note, task_table


def compare_runs(folders: Sequence[Path], out: Path) -> str:
    """Tables of all runs and a plot over effective depth, as report.md, report.html and plots/ in ``out``. Returns the
    tables for a terminal. Tasks are compared where every run has the same ones measured."""
    documents = [document_of(folder) for folder in folders]
    groups, label = _common(documents, "groups"), "KL to the original, nats per token"
    if groups:
        label = f"{groups[0]}, %"
    rows = _over_depth(documents, groups[0] if groups else None)
    drawn = plot(out, "depth", f"{label} over effective depth", lambda: plots.by_depth(rows, label))
    tables = [compared_fidelity(documents)]
    note = "Bars: 95 % interval of the difference to the original." if groups else ""
    sections: reports.Sections = {"": [*tables], "Over effective depth": [drawn, note]}
    if (tasks := documents[0].get("tasks")) and len(_common(documents, "tasks")) == len(tasks):
        tables.append(task_table(documents))
        sections["Tasks"] = [tables[1], task_note(documents[0])]
    reports.write_page(out, f"{len(folders)} runs compared", sections)
    return "\n\n".join(map(page.plain, tables))


def _common(documents: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    return [name for name in documents[0].get(kind) or () if all(name in (d.get(kind) or ()) for d in documents)]


def _over_depth(documents: Sequence[Mapping[str, Any]], group: str | None) -> list[dict[str, Any]]:
    """What :func:`plots.by_depth` draws: a group's mean in per cent with the interval of its difference to the
    original, else the KL."""
    rows: list[dict[str, Any]] = []
    for document in documents:
        figures: Mapping[str, Any] = document["groups"][group]["comparisons"] if group else fidelity(document)
        first = {"depth": document["plan"]["num_layers"], "model": "sequential", "value": 0.0, "interval": (0, 0)}
        rows.append(first)
        for model in ("paired", "recovered"):
            if (found := figures.get(model)) is not None:
                row = {"depth": document["effective_depth"], "model": model, "name": document["name"]}
                if group:
                    first["value"] = 100 * found["original"]
                    ends = [100 * abs(end - found["difference"]) for end in found["interval"]]
                    rows.append({**row, "value": 100 * found["other"], "interval": ends})
                else:
                    rows.append({**row, "value": found["kl"], "interval": (0, 0)})
    return rows
