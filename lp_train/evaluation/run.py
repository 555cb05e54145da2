"""One evaluation: the original, its pairs untuned, and what runs made of them, from one set of weights.

``evaluate`` returns a dictionary of sections for each run; a new kind of measurement is one more line in ``_measure``
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
from lp_train.evaluation import generation
from lp_train.evaluation import report as reports
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.fidelity import Fidelity, Variant, as_it_is, by_domain, by_position
from lp_train.evaluation.generation import Answers
from lp_train.evaluation.statistics import Comparison, compare, mean_of
from lp_train.evaluation.tasks import Items, Suite, is_perplexity, load_suite
from lp_train.pairing import PairPlan, keep_originals, pair_layers, sequential, unpair_layers
from lp_train.pairing.families import decoder_of

UNTUNED: dict[str, Variant] = {"sequential": sequential, "paired": as_it_is}
Say = Callable[[str], None]


@dataclass
class Measured:
    """Results by model: ``sequential``, ``paired``, ``recovered``."""

    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    items: dict[str, dict[str, Items]] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)  # of the tasks: tokens, seconds
    drift: dict[str, list[float]] = field(default_factory=dict)
    generation: dict[str, Answers] = field(default_factory=dict)

    def __or__(self, other: Measured) -> Measured:
        timing = {k: self.timing.get(k, 0) + other.timing.get(k, 0) for k in self.timing | other.timing}
        return Measured(
            self.fidelity | other.fidelity,
            self.items | other.items,
            timing,
            self.drift | other.drift,
            self.generation | other.generation,
        )


@dataclass(frozen=True)
class Session:
    """What all models of one evaluation share."""

    config: Config
    bench: Bench
    tokenizer: PreTrainedTokenizerBase
    suite: Suite


def evaluate(
    config: Config, folders: Sequence[Path], state: PartialState, pool: bool = False, say: Say = print
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
    untuned: dict[tuple[PairPlan, str], Measured] = {}
    documents, runs = [], []
    for folder, (plan, algebra) in zip(todo, plans, strict=True):
        name = config.name if folder is None else folder.name
        say(f"{name}: {plan}, {algebra}")
        pair_layers(base, plan, algebra)
        if (plan, algebra) not in untuned:
            original = next(iter(untuned.values())).items["sequential"] if untuned else None
            found = _measure(session, base, {"paired": as_it_is} if original else UNTUNED)
            found.items.setdefault("sequential", original or {})
            untuned[plan, algebra] = found
        measured = untuned[plan, algebra]
        if folder is not None:
            with _tuned(config, base, models._result_folder(str(folder))) as model:
                measured = measured | _measure(session, model, {"recovered": as_it_is})
        unpair_layers(base)
        runs.append(measured)
        documents.append(_document(session, name, plan, algebra, [measured]))
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
        return PairPlan.parse(config.plan.pairs, num_layers=layers), config.plan.algebra
    record = models.read_stamp(models._result_folder(str(folder)))
    if record is None:
        raise UserError(f"{str(folder)!r}: nothing in it says which layers were paired; name a run folder of lp_train")
    return PairPlan.parse(record["pairs"], num_layers=layers), record["algebra"]


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


def _measure(session: Session, model: nn.Module, variants: Mapping[str, Variant]) -> Measured:
    """All kinds of measurement of some variants of one model. Fidelity measures the original itself each time."""
    bench, limit = session.bench, session.config.evaluate.task_batch_size
    others = {name: variant for name, variant in variants.items() if name != "sequential"}
    measured = Measured(fidelity=bench.measure(model, others), drift=bench.drift(model, others))
    if session.config.evaluate.generation_prompts:
        measured.generation = bench.generate(model, session.tokenizer, others)
    if session.suite.tasks:
        measured.items, measured.timing = session.suite.run(
            model, session.tokenizer, variants, bench.dtype, bench.state, limit
        )
    return measured


# --- what is written -------------------------------------------------------------------------------------------------


def _document(session: Session, name: str, plan: PairPlan, algebra: str, runs: Sequence[Measured]) -> dict[str, Any]:
    """The sections of one run, or of several seeds of one recipe, which differ in ``recovered`` alone."""
    first = runs[0]
    figures = {model: [run.fidelity[model].as_dict() for run in runs] for model in first.fidelity}
    document: dict[str, Any] = {
        "name": name,
        "plan": {"pairs": [list(p) for p in plan.pairs], "algebra": algebra, "num_layers": plan.num_layers},
        "effective_depth": plan.effective_depth,
        "seeds": len(runs),
        "evaluate": dataclasses.asdict(session.config.evaluate),
        "fidelity": {m: {k: float(np.mean([f[k] for f in of_m])) for k in of_m[0]} for m, of_m in figures.items()},
        "fidelity_by_position": by_position(first.fidelity),
        "fidelity_by_domain": by_domain(first.fidelity, session.bench.data.domains),
        "drift": {"pairs": _drift(plan, runs)},
        "gap": reports.gap(first.fidelity["sequential"], first.fidelity["paired"]),
        "environment": reports.environment(session.bench.state.device),
        "task_timing": first.timing,
    }
    if first.generation:
        document["generation"] = generation.describe(
            first.generation, generation.PROMPT_TOKENS, session.config.evaluate.generation_tokens
        )
    if "recovered" in first.fidelity and len(runs) == 1:
        document["recovery"] = reports.recovery(*(first.fidelity[m] for m in ("sequential", "paired", "recovered")))
    items = list(_item_lines(session.suite, first)) if len(runs) == 1 else []
    return document | task_sections(session.suite, runs) | {"items": items}


def _drift(plan: PairPlan, runs: Sequence[Measured]) -> list[dict[str, Any]]:
    """Of each pair the relative error of the residual stream after it, for each model; of seeds the mean."""
    of_model = {model: np.mean([run.drift[model] for run in runs], axis=0) for model in runs[0].drift}
    return [
        {"pair": list(pair), **{model: float(errors[i]) for model, errors in of_model.items()}}
        for i, pair in enumerate(plan.pairs)
    ]


def task_sections(suite: Suite, runs: Sequence[Measured]) -> dict[str, Any]:
    """``tasks`` and ``groups``: figures of each model, and comparisons with the original on the same items."""
    tasks: dict[str, Any] = {}
    compared: dict[str, dict[str, Comparison]] = {}  # model, task
    for task, built in suite.tasks.items():
        metric = built.primary
        of_task = {model: [run.items[model][task] for run in runs] for model in sorted(runs[0].items)}
        results = {
            model: {m: float(np.mean([suite.value(task, items, m) for items in seeds])) for m in seeds[0].metrics}
            for model, seeds in of_task.items()
        }
        sums = {model: np.stack([items.sums(metric)[0] for items in seeds]) for model, seeds in of_task.items()}
        weights = of_task["sequential"][0].sums(metric)[1]
        chance = None if is_perplexity(metric) else built.chance
        for model in ("paired", "recovered"):
            if model in sums:
                seeds = sums[model] if model == "recovered" else sums[model][:1]
                compared.setdefault(model, {})[task] = compare(sums["sequential"][0], seeds, weights, chance)
        if "recovered" in sums:
            over = compare(sums["paired"][0], sums["recovered"], weights, chance)
            compared.setdefault("recovered_over_paired", {})[task] = over
        tasks[task] = {
            **built.describe(),
            "unit": "nats" if chance is None else "share",
            "results": results,
            "comparisons": {model: of_model[task].as_dict() for model, of_model in compared.items()},
        }
    groups = {
        group: {
            "shares": shares,
            "comparisons": {
                model: mean_of(of_model, shares, {t: suite.tasks[t].chance for t in shares}).as_dict()
                for model, of_model in compared.items()
            },
        }
        for group, shares in suite.groups.items()
        if not any(is_perplexity(suite.tasks[task].primary) for task in shares)
    }
    return {"tasks": tasks, "groups": groups}


def _item_lines(suite: Suite, measured: Measured) -> Iterator[dict[str, Any]]:
    for task, built in suite.tasks.items():
        for i, doc_id in enumerate(built.doc_ids):
            line: dict[str, Any] = {"task": task, "doc_id": doc_id}
            for model, found in measured.items.items():
                metrics = {name: values[i] for name, values in found[task].metrics.items()}
                line[model] = {"responses": found[task].responses[i], **metrics}
            yield line


def write(folder: Path, document: dict[str, Any]) -> None:
    """``evaluation.json`` and, item by item, ``items.jsonl.gz`` in the folder; each whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    items = "".join(json.dumps(line, default=float) + "\n" for line in document["items"])
    text = reports.as_json({k: v for k, v in document.items() if k != "items"})
    for name, content in (
        ("items.jsonl.gz", gzip.compress(items.encode(), mtime=0)),
        ("evaluation.json", text.encode()),
    ):
        (temporary := folder / f".{name}").write_bytes(content)
        temporary.rename(folder / name)
