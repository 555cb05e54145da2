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

from lp_train import models
from lp_train.config import Config
from lp_train.data import data_of
from lp_train.errors import UserError
from lp_train.evaluation import report as reports
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.fidelity import Fidelity, Variant, as_it_is
from lp_train.evaluation.tasks import Items, Suite, load_suite
from lp_train.pairing import PairPlan, keep_originals, pair_layers, sequential, unpair_layers
from lp_train.pairing.families import decoder_of
from run_evaluation.answers import Answers, answer_held_out, describe
from run_evaluation.tasks import item_lines, task_sections


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
    tokenizer, suite = models.load_tokenizer(config.model), load_suite(config.evaluate)
    with state.main_process_first():
        # of the training text none is used: the held-out text does not depend on it
        data = data_of(config, tokenizer, train_tokens=config.train["max_length"])
    return Session(config, Bench(config, data, tokenizer, state), suite)


def _plan(config: Config, folder: Path | None) -> tuple[PairPlan, str]:
    layers = models.load_model_config(config.model).get_text_config().num_hidden_layers
    if folder is None:
        plan = PairPlan.parse(config.plan.pairs, num_layers=layers).control(config.plan.kind, config.plan.remove)
        return plan, config.plan.algebra
    record = models.read_stamp(models._result_folder(str(folder)))
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
    fidelity, answers = bench.measure(model, this), answer_held_out(bench, model, this)
    items: dict[str, dict[str, Items]] = {}
    if session.suite.tasks:
        where = (bench.dtype, bench.state, options.task_batch_size)
        items, timing = session.suite.run(model, bench.tokenizer, variants, *where)
        session.timing.update({key: session.timing[key] + value for key, value in timing.items()})
    return known | {model: Result(fidelity[model], items.get(model, {}), answers.get(model)) for model in variants}


# --- what is written -------------------------------------------------------------------------------------------------


def _document(session: Session, name: str, plan: PairPlan, algebra: str, runs: Sequence[Results]) -> dict[str, Any]:
    """The sections of one run, or of several seeds of one recipe, which differ in ``recovered`` alone."""
    first, options = runs[0], session.config.evaluate
    fidelity = {model: mean_fidelity([run[model].fidelity for run in runs]) for model in first}
    answers = [{model: result.answers for model, result in run.items() if result.answers} for run in runs]
    items = [{model: result.items for model, result in run.items()} for run in runs]
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
        **task_sections(session.suite, items),
        "items": list(item_lines(session.suite, items[0])) if len(runs) == 1 else [],
    }


def mean_fidelity(seeds: Sequence[Fidelity]) -> Fidelity:
    """Of several seeds of one recipe on the same rows."""
    columns = (field.name for field in dataclasses.fields(Fidelity))
    return Fidelity(*(np.mean([getattr(seed, name) for seed in seeds], axis=0) for name in columns))


def write(folder: Path, document: dict[str, Any]) -> None:
    """``evaluation.json`` and, item by item, ``items.jsonl.gz`` in the folder; each whole or not there."""
    items = "".join(json.dumps(line, default=float) + "\n" for line in document["items"])
    reports.write(folder / "items.jsonl.gz", gzip.compress(items.encode(), mtime=0))
    reports.write(folder / "evaluation.json", reports.as_json({k: v for k, v in document.items() if k != "items"}))
