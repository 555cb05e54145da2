"""The tables of an evaluation: tasks and greedy answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lp_train.evaluation.page import Table, literal
from lp_train.evaluation.tables import FIDELITY, MODELS, fidelity, fidelity_row, short
from lp_train.evaluation.tables import tables as fidelity_tables


def tables(document: Mapping[str, Any]) -> dict[str, Table]:
    """All tables of figures that an evaluation, alone or with its run's report, has something for."""
    found = fidelity_tables(document)
    if document.get("tasks"):
        found["tasks"] = task_table([document])
    if document.get("generation"):
        found["answers"] = generation_table(document["generation"])
    return found


class Column(NamedTuple):
    title: str
    document: Mapping[str, Any]
    model: str


def columns_of(documents: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The models of each document, by the run's name where there are several; an original that all share once."""
    columns: list[Column] = []
    for document in documents:
        for model in MODELS:
            shared = model == "sequential" and columns and same_original(document, columns[0].document)
            if model in fidelity(document) and not shared:
                alone = len(documents) == 1 or (model == "sequential" and not columns)
                title = MODELS[model] if alone else f"{MODELS[model]}\n{literal(document['name'])}"
                columns.append(Column(title, document, model))
    return columns


def same_original(document: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs start from the same model, measured on the same text."""
    nll = [fidelity(d)["sequential"]["nll"] for d in (document, other)]
    return abs(nll[0] - nll[1]) < 1e-3


def compared_fidelity(documents: Sequence[Mapping[str, Any]]) -> Table:
    """The original and what several runs made of it."""
    return Table(FIDELITY, [fidelity_row(*column) for column in columns_of(documents)])


def task_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    """Tasks and groups of evaluations side by side, in per cent, under each the difference to the original with its
    95 % interval. Of each evaluation's last model then the share of the original that is left, plain and above chance.
    """
    columns = [column for column in columns_of(documents) if column.model != "control"]
    last = {id(column.document): column for column in columns}.values()
    head, rows = ["task"], []
    for column in columns:
        head += [column.title] + ["kept\nabove chance"] * (column in last)
    for kind in ("tasks", "groups"):
        for name, found in documents[0][kind].items():
            row = [_task_head(name, found)]
            for column in columns:
                theirs = column.document[kind].get(name)
                row.append(_task_cell(theirs, column.model))
                if column in last:
                    row.append(_kept_cell(theirs, column.model))
            rows.append(row)
    return Table(head, rows)


def task_note(document: Mapping[str, Any]) -> str:
    """How to read :func:`task_table`, and where the examples in the prompts come from."""
    note = "Per cent; below, the difference to the original on the same items with its 95 % interval (n.s.: not told "
    note += (
        "apart from zero; of perplexities in nats). Kept: the share of the original's figure that is left; below, of "
    )
    note += "what is above chance."
    sources: dict[str, list[str]] = {}
    for name, task in document["tasks"].items():
        if task["fewshot_source"]:
            sources.setdefault(task["fewshot_source"], []).append(short(name))
    return note + "".join(f" Examples of {', '.join(names)}: {source}." for source, names in sources.items())


def generation_table(generation: Mapping[str, Any]) -> Table:
    """What the models' greedy answers have in common with the original's, and how much they repeat themselves."""
    head = ("model", "tokens agreed", "identical", "KL on its answers", "distinct 1/2/3-grams", "4-grams repeated")
    rows = []
    for model, row in generation["models"].items():
        agreed = ("", "", "")
        if model != "sequential":
            error = row["kl_standard_error"]  # null of a single prompt
            kl = f"{row['kl_on_original_answers']:.3f}" + ("" if error is None else f" ± {error:.3f}")
            agreed = (f"{row['agreed_tokens']:.1f}", f"{row['identical_answers']:.0%}", kl)
        distinct = " / ".join(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3))
        rows.append((MODELS[model], *agreed, distinct, f"{row['repeated_4grams']:.0%}"))
    return Table(head, rows)


def _task_head(name: str, found: Mapping[str, Any]) -> str:
    if "shares" in found:
        return f"{name}\nmean of {len(found['shares'])} tasks"
    chance = f", chance {100 * found['chance']:.0f}" if found["chance"] else ""
    return f"{short(name)}\n{found['metric']}, {found['items']:,} items, {found['num_fewshot']}-shot{chance}"


def _task_cell(found: Mapping[str, Any] | None, model: str) -> str:
    """``36.5`` and below ``−4.6 [−6.4, −2.8]``; of a perplexity the difference is in nats."""
    if found is None:
        return "not run"
    comparison = found["comparisons"]["paired" if model == "sequential" else model]
    scale, digits = (1, 3) if found.get("unit") == "nats" else (100, 1)
    value = scale * comparison["original" if model == "sequential" else "other"]
    figure = f"{math.exp(value):.2f}" if scale == 1 else f"{value:.1f}"
    if model == "sequential":
        return figure
    ends = (comparison["difference"], *comparison["interval"])
    difference, low, high = (f"{scale * x:+.{digits}f}".replace("-", "−") for x in ends)
    return f"{figure}\n{difference} [{low}, {high}]{'' if comparison['differs'] else ' n.s.'}"


def _kept_cell(found: Mapping[str, Any] | None, model: str) -> str:
    """Above chance only where the original is, by more than twice its standard error."""
    if found is None or (c := found["comparisons"][model])["retained"] is None:
        return ""
    error = math.sqrt(max(c["original"] * (1 - c["original"]), 0) / c["items"])
    above = c["original"] - (c.get("chance", found.get("chance")) or 0)
    clear = c["retained_above_chance"] is not None and above > 2 * error
    return f"{c['retained']:.1f} %\n" + (f"{c['retained_above_chance']:.1f} %" if clear else "–").replace("-", "−")
