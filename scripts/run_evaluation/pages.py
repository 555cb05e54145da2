"""The page and the card of a run, made again from what lies in its folder, with what was measured since."""

from __future__ import annotations

import fcntl
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from lp_train import track
from lp_train.config import TrackConfig, load_config
from lp_train.errors import UserError
from lp_train.evaluation import report as reports
from lp_train.evaluation.card import result, write_card
from lp_train.evaluation.page import literal
from lp_train.evaluation.plots import plot
from lp_train.evaluation.report import EVALUATIONS
from lp_train.evaluation.tables import short
from run_evaluation import plots
from run_evaluation.tables import generation_table, tables, task_note, task_table


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
    report, evaluation = _read(folder / "report.json"), _read(folder / "evaluation.json") or {}
    if report is None:
        document = document_of(folder)
        return reports.write_document(folder, document, evaluated=_sections(folder, document))
    config = load_config(folder / "resolved_config.yaml")
    metrics = folder / "metrics.jsonl"
    history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    document = {**report, **evaluation, "name": report["name"], "environment": report["environment"]}
    tokens_per_step = config.train["global_batch_tokens"]
    reports.write_document(folder, document, history, tokens_per_step, _sections(folder, document))
    shown = tables({**report, **evaluation})
    of_card = [shown[name] for name in ("fidelity", "tasks") if name in shown]
    write_card(folder, report, config.model.name_or_path, of_card, _results(evaluation))


def add_to_wandb(config: TrackConfig, folder: Path, run_name: str, document: Mapping[str, Any]) -> None:
    """Adds what was measured after a run to its W&B run; nothing where the run was not tracked."""
    if (folder / "wandb_id").exists() and track.start(config, folder, run_name, {}):
        track.finish(document, tables(document), folder)


def document_of(folder: Path) -> dict[str, Any]:
    """What there is of a run, an evaluation rather than a report, under the folder's own name."""
    found = _read(folder / "evaluation.json") or _read(folder / "report.json")
    if found is None:
        raise UserError(f"{folder}: neither report.json nor evaluation.json in it; name the folder of a finished run")
    return {**found, "name": folder.name}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); measure the run again") from None


def _results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The recovered model's tasks, for the card."""
    found = []
    for task, of_task in evaluation.get("tasks", {}).items():
        if (figures := of_task["results"].get("recovered")) is not None:
            metric = of_task["metric"]
            found.append(result(task, task, metric, f"{metric}, {of_task['num_fewshot']}-shot", figures[metric]))
    return found


def _sections(folder: Path, document: Mapping[str, Any]) -> reports.Sections:
    """Tasks and greedy answers."""
    sections: reports.Sections = {}
    figure = functools.partial(plot, folder)
    if document.get("tasks"):
        scored = {short(n): task for n, task in document["tasks"].items() if task["unit"] == "share"}
        scored |= {f"{group}, mean": found for group, found in document["groups"].items()}
        drawn = [figure("tasks", "differences to the original", lambda: plots.tasks(scored))] if scored else []
        sections["Tasks"] = [task_table([document]), task_note(document), *drawn]
    if g := document.get("generation"):
        note = f"Greedy answers of up to {g['new_tokens']} tokens to the first {g['prompt_tokens']} tokens of "
        note += f"{g['prompts']} held-out documents. Tokens agreed: those before the first difference to the answer of "
        note += "the original. KL on its answers: nats per token along the answers of the original, ± standard error."
        sections["Greedy answers"] = [generation_table(g), note]
    return sections
