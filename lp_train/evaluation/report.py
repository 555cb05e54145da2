"""What a run found, in figures and in words: report.json, report.md, report.html and the plots."""

import contextlib
import functools
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import accelerate
import torch

from lp_train.evaluation import page, plots, tables
from lp_train.evaluation.fidelity import Fidelity, by_domain, by_position, standard_error
from lp_train.evaluation.page import Table, literal
from lp_train.pairing import PairPlan

EVALUATIONS = "evaluations"  # in a run folder: step-N/ for each checkpoint that a job of its own measures
History = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "lm-eval", "flash-attn-4")


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


def fidelity_sections(figures: Mapping[str, Fidelity], plan: PairPlan, domains: Sequence[str]) -> dict[str, Any]:
    """What held-out text says beyond the four figures of each model: cost and recovery, by position, domain, pair."""
    original, paired, recovered = (figures.get(model) for model in ("sequential", "paired", "recovered"))
    assert original is not None and paired is not None
    pairs = [
        {"pair": list(pair), **{model: float(f.drift[i]) for model, f in figures.items() if model != "sequential"}}
        for i, pair in enumerate(plan.pairs)
    ]
    return {
        "evaluation": {"tokens": int(original.tokens.sum()), "rows": len(original.tokens)},
        "gap": gap(original, paired),
        **({"recovery": recovery(original, paired, recovered)} if recovered else {}),
        "fidelity_by_position": by_position(figures),
        "fidelity_by_domain": by_domain(figures, domains),
        "drift": {"pairs": pairs},
    }


def plan_section(plan: PairPlan, algebra: str) -> dict[str, Any]:
    """``plan`` of ``report.json``; a control's has ``kind`` and ``removed`` too."""
    section = {"pairs": [list(pair) for pair in plan.pairs], "algebra": algebra, "num_layers": plan.num_layers}
    return section if plan.kind == "pair" else section | {"kind": plan.kind, "removed": list(plan.removed)}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and the engine as it really runs."""
    state = accelerate.PartialState()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "device": name,
        "commit": commit(),
        "distributed_type": str(state.distributed_type.value),
        "num_processes": state.num_processes,
        "backend": state.backend,
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; None outside a checkout. ``LP_COMMIT`` in
    the environment names it on a machine to which files were copied."""
    if named := os.environ.get("LP_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run([*git, "--dirty=+changes"], capture_output=True, text=True, check=True).stdout.strip()
    return None


# --- the page --------------------------------------------------------------------------------------------------------

Sections = dict[str, list[Any]]  # under each heading paragraphs, tables, plots in Markdown


def write_document(
    folder: Path,
    document: Mapping[str, Any],
    history: History = (),
    tokens_per_step: int = 0,
    evaluated: Sections | None = None,
) -> None:
    """The page of a report, an evaluation or both together; what is not measured has no section. ``evaluated``: the
    sections that only an evaluation has."""
    figure, trained = functools.partial(plots.plot, folder), "train" in document
    picture = f"```text\n{tables.draw(document['plan'])}\n```"
    sections: Sections = {"": [tables.fidelity_table(document), _fidelity_note(document), picture]}
    if trained or document.get("heal"):
        sections[""].insert(0, tables.sentence(document))
    if history:
        curve = figure("recovery", "recovery", lambda: plots.recovery(document, history, tokens_per_step))
        sections["Recovery over training"] = [curve]
    if (by_step := checkpoints(folder)) is not None:
        sections["Checkpoints"] = [by_step]
    sections |= (evaluated or {}) | _fidelity_sections(document, figure)
    if sample := document.get("sample"):
        rows = [(tables.MODELS[key], literal(text)) for key, text in sample.items() if key in tables.MODELS]
        answers = Table(("model", "answer"), rows, numbers=2)
        sections["One prompt, answered by each model"] = [f"Prompt: {literal(sample['prompt'])}", answers]
    if trained:
        sections["Memory and speed"] = [_speed_table(document)]
    sections["Environment"] = [_environment_table(document["environment"])]
    if trained or document.get("heal"):
        sections["To reproduce"] = [f"```bash\n{_commands(folder, document)}\n```"]
    title = f"{document['name']}: {document['plan']['num_layers']} layers, {document['effective_depth']} deep"
    write_page(folder, title, sections)


def write_page(folder: Path, title: str, sections: Sections) -> None:
    parts = [f"# {literal(title)}"]
    for heading, blocks in sections.items():
        parts += [f"## {heading}"] * bool(heading) + [str(block) for block in blocks]
    markdown = "\n\n".join(parts) + "\n"
    write(folder / "report.md", markdown)
    write(folder / "report.html", page.html(title, markdown, folder))


def write(path: Path, content: str | bytes) -> None:
    """The whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoints(folder: Path) -> Table | None:
    """What jobs of their own have measured of a run's checkpoints so far, a row each."""
    files = sorted(folder.glob(f"{EVALUATIONS}/step-*/evaluation.json"), key=lambda p: int(p.parent.name[5:]))
    return tables.checkpoint_table({p.parent.name[5:]: json.loads(p.read_text()) for p in files}) if files else None


def _fidelity_sections(document: Mapping[str, Any], figure: Callable[..., str]) -> Sections:
    sections: Sections = {}
    domains = (document.get("fidelity_by_domain") or {}).get("domains") or []
    if len(domains) > 1:
        sections["By domain"] = [tables.domain_table(domains)]
    if by := document.get("fidelity_by_position"):
        curve = figure("position", "fidelity by position", lambda: plots.positions(by["buckets"]))
        sections["By position in the document"] = [curve]
    if document.get("drift"):
        note = "How far the residual stream after each pair is from the original's on the same tokens, relative to its "
        note += "length there."
        curve = figure("drift", "drift by layer", lambda: plots.drift(document["drift"]["pairs"]))
        sections["Drift by layer"] = [note, curve]
    return sections


def _fidelity_note(document: Mapping[str, Any]) -> str:
    measured, gap = document.get("evaluation"), document.get("gap") or {}
    note = f"On {measured['tokens']:,} held-out tokens ({measured['rows']} rows). " if measured else ""
    note += "NLL and KL(original ‖ model) in nats per token; depth: layers on the longest path."
    if gap.get("nll_se") is not None:
        note += f" Standard errors of what pairing costs: NLL {gap['nll_se']:.4f}, KL {gap['kl_se']:.4f}."
    if document.get("unquantised"):
        note += f" The original before quantisation has NLL {document['unquantised']['nll']:.4f} on the same text."
    return note


def _environment_table(environment: Mapping[str, Any]) -> Table:
    rows = [("commit", str(environment["commit"])), ("device", environment["device"])]
    engine = "" if environment["num_processes"] == 1 else f", {environment['distributed_type']}"
    rows += [("processes", f"{environment['num_processes']}{engine}")]
    rows += [(name, str(number)) for name, number in environment["versions"].items()]
    return Table(("what", "version"), rows, numbers=2)


def _speed_table(document: Mapping[str, Any]) -> Table:
    train, timing = document["train"], document.get("task_timing") or {}
    dropped = f"{train['trained_tokens']:,} trained, {train['dropped_tokens']:,} dropped"
    rows = [("training", f"{train['tokens']:,} tokens ({dropped}) in {train['seconds']:,.0f} s")]
    rows += [("training speed", f"{train['tokens_per_second']:,.0f} tokens/s")]
    rows += [("peak memory", f"{train['peak_memory_gib']:.1f} GiB")]
    if timing.get("seconds"):
        speed = f"{timing['tokens'] / timing['seconds']:,.0f} tokens/s"
        rows += [("tasks, all models", f"{timing['tokens']:,} tokens in {timing['seconds']:,.0f} s, {speed}")]
    return Table(("what", "measured"), rows, numbers=2)


def _commands(folder: Path, document: Mapping[str, Any]) -> str:
    """Into a new folder: a run is not started over where its report lies."""
    processes, again = document["environment"]["num_processes"], f"{folder}-again"
    several = f"--num_processes {processes} " if processes > 1 else ""
    config, output = shlex.quote(f"{folder}/resolved_config.yaml"), shlex.quote(f"train.output_dir={again}")
    if healed := document.get("heal"):
        return f"python scripts/heal.py {config} --tokens {healed['asked_tokens']} --out {shlex.quote(again)}"
    lines = [f"accelerate launch {several}lp_train/finetune.py {config} {output}"]
    if "evaluate" in document:
        options = [again]
        for name, value in document["evaluate"].items():
            if name.startswith(("task", "num_f", "gen")) and value is not None:
                options.append(f"evaluate.{name}={json.dumps(value) if isinstance(value, list) else value}")
        lines.append(f"python scripts/evaluate_run.py {config} {shlex.join(options)}")
    return "\n".join([*lines, f"python scripts/report.py {shlex.quote(again)}"])


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity (a standard error over one row): null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
