"""One evaluation: the original, its pairs untuned, and what runs made of them, from one set of weights.

``evaluate`` returns a dictionary of sections for each run; a new kind of measurement is one more field of ``Result``
and one more section in ``_document``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from lp_train import models
from lp_train.config import Config
from lp_train.data import RowCollator, build_data
from lp_train.errors import UserError
from lp_train.evaluation import report as reports
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.fidelity import Fidelity, Variant, as_it_is
from lp_train.evaluation.tasks import Items, Suite, is_perplexity, load_suite
from lp_train.pairing import PairPlan, keep_originals, pair_layers, sequential, unpair_layers
from lp_train.pairing.families import decoder_of
from run_evaluation.answers import Answers, answer_held_out, describe
from run_evaluation.statistics import Comparison, compare, mean_of


@dataclass(frozen=True)
class Result:
    """What was measured of one model."""

    fidelity: Fidelity
    items: Mapping[str, Items]  # by task
    answers: Answers | None


Results = dict[str, Result]  # by model: sequential, paired, recovered


@dataclass(frozen=True)
class Session:
    """What all models of one evaluation share. ``timing`` adds up the tasks' tokens and seconds."""

    config: Config
    bench: Bench
    tokenizer: PreTrainedTokenizerBase
    suite: Suite
    timing: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0})


def evaluate(
    config: Config, folders: Sequence[Path], state: PartialState, pool: bool = False, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """A document for each run folder; without one, for the untuned pairs of ``config.plan``. All processes take part.

    Each run brings its own plan; base, text and tasks are those of ``config``. With ``pool`` the folders are seeds of
    one recipe, and a last document holds their mean. A document's ``items`` are its results item by item.

    Raises:
        UserError: a folder without a finished run, of another base, or with another plan where seeds are pooled; tasks.
    """
    todo: Sequence[Path | None] = folders or [None]
    plans = [_plan(config, folder) for folder in todo]
    if pool and (len(folders) < 2 or any(plan != plans[0] for plan in plans)):
        raise UserError("--pool: seeds of one recipe are at least two runs with the same plan; name such folders")
    session = _session(config, state)
    say(f"{len(session.suite.tasks)} tasks, {sum(len(t.docs) for t in session.suite.tasks.values()):,} items")
    base = models.load_base(config.model, state.device)
    original: Results = {}
    untuned: dict[tuple[PairPlan, str], Results] = {}
    documents, runs = [], []
    for folder, (plan, algebra) in zip(todo, plans, strict=True):
        name = config.name if folder is None else folder.name
        say(f"{name}: {plan}, {algebra}")
        pair_layers(base, plan, algebra)
        if (plan, algebra) not in untuned:
            untuned[plan, algebra] = _measure(session, base, "paired", original)
            original = {"sequential": untuned[plan, algebra]["sequential"]}
        results = untuned[plan, algebra]
        if folder is not None:
            with _tuned(config, base, models._result_folder(str(folder))) as model:
                results = _measure(session, model, "recovered", results)
        unpair_layers(base)
        runs.append(results)
        documents.append(_document(session, name, plan, algebra, [results]))
    if pool:
        documents.append(_document(session, f"mean of {len(runs)} runs", *plans[0], runs))
    return documents


def _session(config: Config, state: PartialState) -> Session:
    dtype = models.resolve_dtype(config.model.dtype, state.device)
    tokenizer, length = models.load_tokenizer(config.model), config.train["max_length"]
    suite = load_suite(config.evaluate)
    with state.main_process_first():
        data = build_data(
            config.data,
            tokenizer,
            max_length=length,
            train_tokens=length,  # none is used: the held-out text does not depend on it
            eval_tokens=config.evaluate.tokens,
            kd_on=config.loss.kd_on,
            seed=config.train["seed"],
        )
    bench = Bench(config, data, RowCollator(length, tokenizer.pad_token_id), state, dtype)
    return Session(config, bench, tokenizer, suite)


def _plan(config: Config, folder: Path | None) -> tuple[PairPlan, str]:
    layers = models.load_model_config(config.model).get_text_config().num_hidden_layers
    if folder is None:
        plan = PairPlan.parse(config.plan.pairs, num_layers=layers).control(config.plan.kind, config.plan.remove)
        return plan, config.plan.algebra
    result = models._result_folder(str(folder))
    is_result = any((result / name).exists() for name in ("adapter_config.json", "config.json"))
    record = models.read_stamp(result) if is_result else None
    if record is None:
        raise UserError(f"{str(folder)!r}: nothing in it says which layers were paired; name a run folder of lp_train")
    return models.recorded_plan(record, layers), record["algebra"]


@contextlib.contextmanager
def _tuned(config: Config, base: nn.Module, folder: Path) -> Iterator[nn.Module]:
    """Inside: the paired base with the adapter or the tuned layers of ``folder``; afterwards without them again."""
    models.check_stamp(folder, base)
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        yield model
        model.unload()
        return
    keep_originals(base)
    with_model = dataclasses.replace(config.model, name_or_path=str(folder), revision=None)
    base.load_state_dict(models.load_base(with_model, next(base.parameters()).device).state_dict())
    yield base
    for layer in decoder_of(base).layers:
        if (original := getattr(layer, "_original", None)) is not None:
            layer.load_state_dict(original.state_dict())


def _measure(session: Session, model: nn.Module, name: str, known: Results) -> Results:
    """``known`` and the model as it is, under ``name``; also the original, where it is not known yet."""
    this: dict[str, Variant] = {name: as_it_is}
    variants = this if known else {"sequential": sequential, **this}
    bench, options = session.bench, session.config.evaluate
    fidelity, answers = bench.measure(model, this), answer_held_out(bench, model, session.tokenizer, this)
    items: dict[str, dict[str, Items]] = {}
    if session.suite.tasks:
        where = (bench.dtype, bench.state, options.task_batch_size)
        items, timing = session.suite.run(model, session.tokenizer, variants, *where)
        session.timing.update({key: session.timing[key] + value for key, value in timing.items()})
    return known | {model: Result(fidelity[model], items.get(model, {}), answers.get(model)) for model in variants}


# --- what is written -------------------------------------------------------------------------------------------------


def _document(session: Session, name: str, plan: PairPlan, algebra: str, runs: Sequence[Results]) -> dict[str, Any]:
    """The sections of one run, or of several seeds of one recipe, which differ in ``recovered`` alone."""
    first, options = runs[0], session.config.evaluate
    fidelity = {model: Fidelity.mean([run[model].fidelity for run in runs]) for model in first}
    answers = [{model: result.answers for model, result in run.items() if result.answers} for run in runs]
    return {
        "name": name,
        "plan": reports.plan_section(plan, algebra),
        "effective_depth": plan.effective_depth,
        "seeds": len(runs),
        "evaluate": dataclasses.asdict(options),
        "fidelity": {model: figures.as_dict() for model, figures in fidelity.items()},
        **reports.fidelity_sections(fidelity, plan, session.bench.data.domains),
        "environment": reports.environment(session.bench.state.device),
        "task_timing": dict(session.timing),
        **({"generation": describe(answers, options.generation_tokens)} if answers[0] else {}),
        **task_sections(session.suite, runs),
        "items": list(_item_lines(session.suite, first)) if len(runs) == 1 else [],
    }


def task_sections(suite: Suite, runs: Sequence[Results]) -> dict[str, Any]:
    """``tasks`` and ``groups``: figures of each model, and comparisons with the original on the same items."""
    tasks: dict[str, Any] = {}
    compared: dict[str, dict[str, Comparison]] = {}  # model, task
    for task, built in suite.tasks.items():
        of_task = {model: [run[model].items[task] for run in runs] for model in sorted(runs[0])}
        figures = {model: [built.figures(items) for items in seeds] for model, seeds in of_task.items()}
        for model, comparison in _comparisons(of_task, built.primary, built.chance).items():
            compared.setdefault(model, {})[task] = comparison
        tasks[task] = {
            "items": len(built.docs),
            "num_fewshot": built.task.config.num_fewshot,
            "fewshot_source": built.fewshot_source,
            "metric": built.primary,
            "chance": built.chance,
            "unit": "nats" if is_perplexity(built.primary) else "share",
            "results": {
                m: {k: float(np.mean([f[k] for f in seeds])) for k in seeds[0]} for m, seeds in figures.items()
            },
            "comparisons": {model: of_model[task].as_dict() for model, of_model in compared.items()},
        }
    groups = {}
    for group, shares in suite.groups.items():
        if not any(is_perplexity(suite.tasks[task].primary) for task in shares):
            chances = {task: suite.tasks[task].chance for task in shares}
            means = {model: mean_of(of_model, shares, chances) for model, of_model in compared.items()}
            groups[group] = {"shares": shares, "comparisons": {model: mean.as_dict() for model, mean in means.items()}}
    return {"tasks": tasks, "groups": groups}


def _comparisons(of_task: Mapping[str, Sequence[Items]], metric: str, chance: float) -> dict[str, Comparison]:
    """Each model's items, of one or more seeds, against the original's."""
    values = {model: np.stack([items.sums(metric)[0] for items in seeds]) for model, seeds in of_task.items()}
    weights, floor = of_task["sequential"][0].sums(metric)[1], None if is_perplexity(metric) else chance
    values = {model: seeds if model == "recovered" else seeds[:1] for model, seeds in values.items()}
    original = values.pop("sequential")[0]
    return {model: compare(original, seeds, weights, floor) for model, seeds in values.items()}


def _item_lines(suite: Suite, results: Results) -> Iterator[dict[str, Any]]:
    for task, built in suite.tasks.items():
        for i, doc_id in enumerate(built.doc_ids):
            line: dict[str, Any] = {"task": task, "doc_id": doc_id}
            for model, result in results.items():
                metrics = {name: values[i] for name, values in result.items[task].metrics.items()}
                line[model] = {"responses": result.items[task].responses[i], **metrics}
            yield line


def write(folder: Path, document: dict[str, Any]) -> None:
    """``evaluation.json`` and, item by item, ``items.jsonl.gz`` in the folder; each whole or not there."""
    items = "".join(json.dumps(line, default=float) + "\n" for line in document["items"])
    reports.write(folder / "items.jsonl.gz", gzip.compress(items.encode(), mtime=0))
    reports.write(folder / "evaluation.json", reports.as_json({k: v for k, v in document.items() if k != "items"}))
