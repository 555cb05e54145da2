"""Finished run folders: their reports made again, and several side by side."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lp_train.config import load_config
from lp_train.errors import UserError
from lp_train.evaluation import page, plots
from lp_train.evaluation import report as reports
from lp_train.evaluation.card import model_card
from lp_train.evaluation.page import literal
from lp_train.evaluation.tables import fidelity, fidelity_table, task_note, task_table

EVALUATIONS = "evaluations"  # in a run folder: step-N/ for each checkpoint that a job of its own measures


def add_row(folder: Path) -> None:
    """Brings what was measured of a run's checkpoints into its ``evaluations.md``, and into its report once there is
    one. Jobs that end together wait for each other."""
    with (folder / EVALUATIONS / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if (found := reports.checkpoints(folder)) is not None:
            reports.write(folder / "evaluations.md", f"# {literal(folder.name)}: checkpoints\n\n{found}\n")
        if (folder / "report.json").exists():
            refresh(folder)


def refresh(folder: Path) -> None:
    """Report and card of one run, from what lies in its folder. A folder that only ``evaluate_run.py`` wrote gets the
    sections of its evaluation.

    Raises:
        UserError: neither report.json nor evaluation.json in it, or one that cannot be read.
    """
    report, evaluation = _read(folder / "report.json"), _read(folder / "evaluation.json")
    if report is None:
        return reports.write_document(folder, _document(folder))
    config = load_config(folder / "resolved_config.yaml")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reports.write_report(folder, report, history, config.train["global_batch_tokens"], evaluation)
    write_card(folder, report, config.model.name_or_path, evaluation)


def write_card(folder: Path, report: Mapping[str, Any], base: str, evaluation: Mapping[str, Any] | None = None) -> None:
    """README.md beside the weights of a run."""
    weights = folder / ("adapter" if report["tune"] == "lora" else "model")
    reports.write(weights / "README.md", model_card(report, base, evaluation))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); measure the run again") from None


def _document(folder: Path) -> dict[str, Any]:
    """What there is of a run, an evaluation rather than a report, under the folder's own name."""
    found = _read(folder / "evaluation.json") or _read(folder / "report.json")
    if found is None:
        raise UserError(f"{folder}: neither report.json nor evaluation.json in it; name the folder of a finished run")
    return {**found, "name": folder.name}


def compare_runs(folders: Sequence[Path], out: Path) -> str:
    """Tables of all runs and a plot over effective depth, as report.md, report.html and plots/ in ``out``. Returns the
    tables for a terminal. Tasks are compared where every run has the same ones measured."""
    documents = [_document(folder) for folder in folders]
    groups, label = _common(documents, "groups"), "KL to the original, nats per token"
    if groups:
        label = f"{groups[0]}, %"
    rows = _over_depth(documents, groups[0] if groups else None)
    drawn = plots.plot(out, "depth", f"{label} over effective depth", lambda: plots.by_depth(rows, label))
    tables = [fidelity_table(documents)]
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
