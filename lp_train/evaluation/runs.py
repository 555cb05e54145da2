"""Finished run folders: their reports made again, and several side by side."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lp_train.config import load_config
from lp_train.errors import UserError
from lp_train.evaluation import page, plots
from lp_train.evaluation import report as reports
from lp_train.evaluation.card import model_card
from lp_train.evaluation.page import Section


def refresh(folder: Path) -> None:
    """Report and card of one run, from what lies in its folder. A folder that only ``evaluate_run.py`` wrote gets the
    sections of its evaluation.

    Raises:
        UserError: neither report.json nor evaluation.json in it, or one that cannot be read.
    """
    report, evaluation = _read(folder / "report.json"), _read(folder / "evaluation.json")
    if report is None and evaluation is None:
        raise UserError(f"{folder}: neither report.json nor evaluation.json in it; name the folder of a finished run")
    if report is None:
        assert evaluation is not None
        sections: list[Section] = [("", [reports.fidelity_table([evaluation])])]
        reports.write_page(folder, evaluation["name"], sections + list(reports.evaluation_sections(folder, evaluation)))
        return
    config = load_config(folder / "resolved_config.yaml")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    reports.write_report(folder, report, history, config.train["global_batch_tokens"])
    write_card(folder, report, config.model.name_or_path)


def write_card(folder: Path, report: Mapping[str, Any], base: str) -> None:
    """README.md beside the weights of a run."""
    weights = folder / ("adapter" if report["tune"] == "lora" else "model")
    reports.write(weights / "README.md", model_card(report, base, _read(folder / "evaluation.json")))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); measure the run again") from None


def compare_runs(folders: Sequence[Path], out: Path) -> str:
    """Tables of all runs and a plot over effective depth, as report.md, report.html and plots/ in ``out``. Returns the
    tables as Markdown. Tasks are compared where every run has the same ones measured."""
    documents = [_with_evaluation(folder) for folder in folders]
    figure = functools.partial(plots.plot, out)
    tables = [reports.fidelity_table(documents)]
    rows, label = _fidelity_rows(documents), "KL to the original, nats per token"
    same = {tuple(document.get("tasks") or ()) for document in documents}
    if len(same) == 1 and documents[0].get("tasks"):
        tables.append(reports.task_table(documents))
        rows, label = _task_rows(documents)
    drawn = figure("depth", f"{label} over effective depth", lambda: plots.by_depth(rows, label))
    reports.write_page(out, f"{len(folders)} runs", [("", tables[:1]), ("Over effective depth", [drawn, *tables[1:]])])
    return "\n\n".join(map(page.table, tables))


def _with_evaluation(folder: Path) -> dict[str, Any]:
    """What there is of a run, under the names of evaluation.json and with the folder's own name."""
    report, evaluation = _read(folder / "report.json"), _read(folder / "evaluation.json")
    found = evaluation or report or {}
    return {**found, "name": folder.name}


def _fidelity_rows(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = [_row(documents[0]["plan"]["num_layers"], "sequential", 0.0, 0.0)]
    for document in documents:
        figures = document.get("fidelity") or document
        for model in ("paired", "recovered"):
            if model in figures:
                rows.append(_row(document["effective_depth"], model, figures[model]["kl"], 0.0))
    return rows


def _task_rows(documents: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The mean of the first group that all have, else of all tasks with an accuracy, in per cent; with 95 %."""
    group = next(iter(documents[0]["groups"]), None)
    rows = []
    for document in documents:
        if group is not None:
            found = [document["groups"][group]["comparisons"]]
        else:
            found = [task["comparisons"] for task in document["tasks"].values() if task["unit"] != "nats"]
        for model in found[0] if found else ():
            if model == "recovered_over_paired":
                continue
            of_model = [c[model] for c in found]
            error = sum(c["standard_error"] ** 2 for c in of_model) ** 0.5 / len(of_model)
            mean = {side: 100 * sum(c[side] for c in of_model) / len(of_model) for side in ("original", "other")}
            rows.append(_row(document["effective_depth"], model, mean["other"], 196 * error))
            rows.append(_row(document["plan"]["num_layers"], "sequential", mean["original"], 0.0))
    return rows, f"{group or 'mean of the tasks'}, %"


def _row(depth: int, model: str, value: float, error: float) -> dict[str, Any]:
    return {"depth": depth, "model": model, "value": value, "error": error}
