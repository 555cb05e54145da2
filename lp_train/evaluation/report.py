"""What a run found, in figures and in words: report.json, report.md, report.html and the plots."""

from __future__ import annotations

import functools
import json
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch

from lp_train.evaluation import page, plots
from lp_train.evaluation.fidelity import Fidelity, standard_error
from lp_train.evaluation.page import Block, Commands, Section, Table

MODELS = {**plots.NAMES, "control": "control (not paired)"}
History = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def gap(sequential: Fidelity, paired: Fidelity) -> dict[str, float]:
    """What pairing costs, nats per token, each with its standard error over rows of the same text."""
    tokens = paired.tokens
    return {
        "nll": paired.nll - sequential.nll,
        "nll_se": standard_error(paired.nll_sums - sequential.nll_sums, tokens),
        "kl": paired.kl,
        "kl_se": standard_error(paired.kl_sums, tokens),
    }


def recovery(sequential: Fidelity, paired: Fidelity, recovered: Fidelity) -> dict[str, float | None]:
    """(paired - recovered) / (paired - sequential) for NLL and KL; None where that gap is below two standard errors."""
    found = gap(sequential, paired)
    won = {"nll": paired.nll - recovered.nll, "kl": paired.kl - recovered.kl}
    return {name: won[name] / found[name] if found[name] > 2 * found[f"{name}_se"] else None for name in won}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and the engine as it really runs."""
    state = accelerate.PartialState()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": name,
        "commit": _commit(),
        "distributed_type": str(state.distributed_type.value),
        "num_processes": state.num_processes,
        "backend": state.backend,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if status.stdout.strip() else "")


# --- in words --------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """The held-out figures as Markdown."""
    return page.table(fidelity_table([report]))


def fidelity_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    """The original and what pairs made of it: of one report, or of several evaluations with the same original."""
    rows = []
    for column in _columns(documents):
        f = (column.document.get("fidelity") or column.document)[column.model]
        figures = (f"{f['nll']:.4f}", f"{f['ppl']:.2f}", f"{f['kl']:.4f}", f"{f['top1_agreement']:.1%}")
        rows.append((column.title, str(column.depth), *figures))
    return Table(("model", "depth", "NLL", "perplexity", "KL", "top-1 agreement"), rows)


class _Column(NamedTuple):
    title: str
    document: Mapping[str, Any]
    model: str
    depth: int


def _columns(documents: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """The original once, then the models of each document, by the run's name where there are several."""
    columns = [_Column(MODELS["sequential"], documents[0], "sequential", documents[0]["plan"]["num_layers"])]
    for document in documents:
        for model in ("paired", "recovered", "control"):
            if model in (document.get("fidelity") or document):
                title = MODELS[model] if len(documents) == 1 else f"{document['name']}: {MODELS[model]}"
                depth = document["plan"]["num_layers"] if model == "control" else document["effective_depth"]
                columns.append(_Column(title, document, model, depth))
    return columns


def task_table(documents: Sequence[Mapping[str, Any]]) -> Table:
    """Tasks and groups of evaluations side by side, in per cent. A difference to the original stands in brackets with
    its standard error, "n.s." where it is inside its error; then the share of the original that is left."""
    columns, rows = _columns(documents), []
    for task, found in documents[0]["tasks"].items():
        cells = [_task_cell(column.document["tasks"].get(task), column.model) for column in columns]
        rows.append((f"{task} ({found['metric']})", f"{found['items']:,}", str(found["num_fewshot"]), *cells))
    for group in documents[0]["groups"]:
        cells = [_task_cell(column.document["groups"].get(group), column.model) for column in columns]
        rows.append((f"{group}, mean", "", "", *cells))
    return Table(("task", "items", "shots", *(column.title for column in columns)), rows)


def _task_cell(found: Mapping[str, Any] | None, model: str) -> str:
    """``36.5 (-4.6 ± 0.9), 89 %``."""
    if found is None:
        return "not run"
    in_nats = found.get("unit") == "nats"
    if in_nats:
        figure = f"{found['results'][model][found['metric']]:.2f}"
    elif model == "sequential":
        figure = f"{100 * next(iter(found['comparisons'].values()))['original']:.1f}"
    else:
        figure = f"{100 * found['comparisons'][model]['other']:.1f}"
    if model == "sequential":
        return figure
    c = found["comparisons"][model]
    scale, digits, unit = (1, 3, " nats") if in_nats else (100, 1, "")
    inside = "" if c["differs"] else ", n.s."
    kept = "" if c["retained"] is None else f", {c['retained']:.1f} %"
    difference = f"{scale * c['difference']:+.{digits}f} ± {scale * c['standard_error']:.{digits}f}{unit}"
    return f"{figure} ({difference}{inside}){kept}"


def generation_table(generation: Mapping[str, Any]) -> Table:
    """What the models' greedy answers have in common with the original's, and how much they repeat themselves."""
    columns = ("model", "tokens agreed", "identical", "KL on its answers", "distinct 1/2/3-grams", "4-grams repeated")
    rows = []
    for model, row in generation["models"].items():
        agreed = ("", "", "")
        if model != "sequential":
            error = f"{row['kl_on_original_answers']:.3f} ± {row['kl_standard_error']:.3f}"
            agreed = (f"{row['agreed_tokens']:.1f}", f"{row['identical_answers']:.0%}", error)
        distinct = " / ".join(f"{row[f'distinct_{n}']:.2f}" for n in (1, 2, 3))
        rows.append((MODELS[model], *agreed, distinct, f"{row['repeated_4grams']:.0%}"))
    return Table(columns, rows)


def sentence(report: Mapping[str, Any]) -> str:
    """The result in words."""
    train, layers, depth = report["train"], report["plan"]["num_layers"], report["effective_depth"]
    text = (
        f"Running {len(report['plan']['pairs'])} pairs of layers side by side makes the longest path {depth} layers "
        f"instead of {layers} and costs {report['gap']['nll']:.3f} nats per token; "
        f"training on {train['trained_tokens']:,} tokens in {train['seconds']:.0f} s "
    )
    nll, kl = report["recovery"]["nll"], report["recovery"]["kl"]
    if nll is None or kl is None:
        return text + "cannot be judged: the cost is within twice its standard error on this text."
    text += f"won back {nll:.0%} of that, and {kl:.0%} of the KL divergence to the original."
    if report.get("control"):
        text += (
            f" The loss has a cross-entropy term, which also moves an unpaired model: trained the same way it reaches "
            f"NLL {report['control']['nll']:.4f}, so read the NLL recovery against that and trust the KL."
        )
    return text


def answers(sample: dict[str, str]) -> str:
    """One prompt, answered by each model."""
    lines = [f"Prompt: {sample['prompt']}"]
    lines += [f"- **{MODELS[key]}**: {sample[key].strip()}" for key in MODELS if key in sample]
    return "\n".join(lines)


def write_report(folder: Path, report: Mapping[str, Any], history: History, tokens_per_step: int) -> None:
    """report.json, report.md, report.html and plots/ in the run folder; evaluation.json is used where it lies there."""
    write(folder / "report.json", as_json(report))
    file = folder / "evaluation.json"
    evaluation = json.loads(file.read_text()) if file.exists() else None
    write_page(folder, report["name"], list(_sections(folder, report, history, tokens_per_step, evaluation)))


def write_page(folder: Path, title: str, sections: Sequence[Section]) -> None:
    write(folder / "report.md", page.markdown(title, sections))
    write(folder / "report.html", page.html(title, sections, folder))


def write(path: Path, text: str) -> None:
    """The whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (temporary := path.with_name(f".{path.name}")).write_text(text)
    temporary.rename(path)


def _sections(
    folder: Path,
    report: Mapping[str, Any],
    history: History,
    tokens_per_step: int,
    evaluation: Mapping[str, Any] | None,
) -> Iterator[Section]:
    """What is not measured has no section."""
    figure = functools.partial(plots.plot, folder)
    picture = figure("model", "which layers run side by side", lambda: plots.model_picture(report["plan"]))
    note = f"Measured on {report['evaluation']['tokens']:,} held-out tokens ({report['evaluation']['rows']} rows). "
    note += "KL is KL(original ‖ model) in nats per token."
    if report.get("unquantised"):
        note += f" The original before quantisation has NLL {report['unquantised']['nll']:.4f} on the same text."
    yield "", [sentence(report), fidelity_table([report]), note, picture]
    curve = figure("recovery", "recovery", lambda: plots.recovery(report, history, tokens_per_step))
    yield "Recovery over training", [curve]
    if evaluation:
        yield from evaluation_sections(folder, evaluation)
    if report.get("sample"):
        yield "One prompt, answered by each model", _answer_blocks(report["sample"])
    yield "Memory and speed", [_speed_table(report, evaluation)]
    environment = report["environment"]
    rows = [("commit", str(environment["commit"])), ("device", environment["device"])]
    rows += [("processes", f"{environment['num_processes']}, {environment['distributed_type']}")]
    rows += [(name, str(number)) for name, number in environment["versions"].items()]
    yield "Environment", [Table(("", ""), rows, numbers=2)]
    yield "To reproduce", [Commands(_commands(folder, evaluation))]


def evaluation_sections(folder: Path, found: Mapping[str, Any]) -> Iterator[Section]:
    """The sections of one evaluation.json."""
    figure = functools.partial(plots.plot, folder)
    if found.get("tasks"):
        sources = sorted({t["fewshot_source"] for t in found["tasks"].values() if t["fewshot_source"]})
        note = (
            "In brackets the difference to the original on the same items, with its standard error; n.s.: inside its "
        )
        note += "error. Per cent behind it: what is left of the original's figure."
        note += f" Examples come from {'; '.join(sources)}." if sources else ""
        shown = {name: task for name, task in found["tasks"].items() if task["unit"] != "nats"} | found["groups"]
        drawn = [figure("tasks", "differences to the original", lambda: plots.tasks(shown))] if shown else []
        yield "Tasks", [task_table([found]), note, *drawn]
    if found.get("drift"):
        yield "Drift by layer", [figure("drift", "drift by layer", lambda: plots.drift(found["drift"]["pairs"]))]
    if found.get("fidelity_by_position"):
        section = found["fidelity_by_position"]
        curve = figure("position", "fidelity by position", lambda: plots.positions(section["buckets"], section["unit"]))
        yield "By position in the document", [curve]
    if found.get("fidelity_by_domain"):
        domains = found["fidelity_by_domain"]["domains"]
        bars = figure("domain", "KL by domain", lambda: plots.domains(domains))
        yield "By domain", [_domain_table(domains), bars]
    if found.get("generation"):
        g = found["generation"]
        note = f"Greedy answers of up to {g['new_tokens']} tokens to the first {g['prompt_tokens']} tokens of "
        note += f"{g['prompts']} held-out documents. Tokens agreed: those before the first difference to the original."
        yield "Greedy answers", [generation_table(g), note]


def _domain_table(domains: Sequence[Mapping[str, Any]]) -> Table:
    models = [model for model in MODELS if model in domains[0]["models"] and model != "sequential"]
    columns = ["text", "tokens", "NLL of the original", *(f"KL, {MODELS[model]}" for model in models)]
    rows = []
    for row in domains:
        kl = [f"{row['models'][model]['kl']:.3f}" for model in models]
        rows.append((row["domain"], f"{row['tokens']:,}", f"{row['models']['sequential']['nll']:.3f}", *kl))
    return Table(columns, rows)


def _speed_table(report: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> Table:
    train = report["train"]
    dropped = f"{train['trained_tokens']:,} trained, {train['dropped_tokens']:,} dropped"
    rows = [("training", f"{train['tokens']:,} tokens ({dropped}) in {train['seconds']:,.0f} s")]
    rows += [("training, tokens/s", f"{train['tokens_per_second']:,.0f}")]
    rows += [("peak memory, GiB", f"{train['peak_memory_gib']:.1f}")]
    timing = (evaluation or {}).get("task_timing") or {}
    if timing.get("seconds"):
        rows += [("tasks, tokens/s over all models", f"{timing['tokens'] / timing['seconds']:,.0f}")]
    return Table(("", ""), rows, numbers=2)


def _commands(folder: Path, evaluation: Mapping[str, Any] | None) -> str:
    lines = [f"accelerate launch lp_train/finetune.py {folder}/resolved_config.yaml --overwrite"]
    if evaluation:
        given = {k: v for k, v in evaluation["evaluate"].items() if k.startswith(("task", "num_f", "gen")) and v}
        options = " ".join(f"'evaluate.{name}={_yaml(value)}'" for name, value in given.items())
        lines.append(f"python scripts/evaluate_run.py {folder}/resolved_config.yaml {folder} {options}")
    return "\n".join([*lines, f"python scripts/report.py {folder}"])


def _yaml(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _answer_blocks(sample: Mapping[str, str]) -> list[Block]:
    rows = [(MODELS[key], sample[key].strip()) for key in MODELS if key in sample]
    return [f"Prompt: {sample['prompt']}", Table(("model", "answer"), rows, numbers=2)]


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity (a standard error over one row): null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
