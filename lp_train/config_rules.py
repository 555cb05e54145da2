"""Rules of a configuration that a type cannot express. Each gives lines: the value, the rule, the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lp_train.errors import UserError
from lp_train.pairing.plan import AutoPairs, PairPlan
from lp_train.trainer_options import SAFE_INIT

if TYPE_CHECKING:
    from lp_train.config import Config, Source

_TEACHER = "without adapters the model must be the original, its teacher, and this may change it"
_ANY_MODEL = 10_000  # layers: the plan's form is checked here, its range when the model is known


_TRAIN = "max_steps max_steps_float32 num_train_epochs global_batch_tokens max_length learning_rate "
_TRAIN += "gradient_checkpointing_every task_steps early_stopping_patience"
_EVALUATE = "tokens batch_size max_new_tokens generation_tokens task_limit task_batch_size"
_BOUNDS: list[tuple[str, str, Callable[[float], bool], str]] = [  # section, keys, what holds for their values, the rule
    ("lora", "r", lambda v: v >= 1, "a rank is at least 1, for example 16"),
    ("loss", "kd ce hidden", lambda v: v >= 0, "a weight is 0 or more, for example 1.0"),
    ("loss", "beta", lambda v: 0 <= v <= 1, "between 0 (forward KL) and 1 (reverse KL), for example 0.0"),
    ("loss", "temperature", lambda v: v > 0, "must be above 0, for example 1.0"),
    ("data", "eval_fraction", lambda v: 0 < v < 1, "a share above 0 and below 1, for example 0.02"),
    ("data", "calibration_fraction", lambda v: 0 <= v < 1, "a share from 0 to below 1, for example 0.02"),
    ("train", _TRAIN, lambda v: v > 0, "must be above 0"),
    ("evaluate", _EVALUATE, lambda v: v >= 1, "must be at least 1"),
    ("evaluate", "num_fewshot generation_prompts", lambda v: v >= 0, "must be 0 or more"),
]


def broken_rules(config: Config) -> list[str]:
    """One line per broken rule of a configuration whose values have the right types."""
    return [line for rule in (_plan, _bounds, _lora, _loss, _data, _train) for line in rule(config)]


def _bounds(config: Config) -> Iterator[str]:
    for section, keys, holds, rule in _BOUNDS:
        values = getattr(config, section)
        for key in keys.split():
            value = values.get(key) if isinstance(values, dict) else getattr(values, key)
            if value is not None and not holds(value):
                yield f"{section}.{key} {value}: {rule}"


def _plan(config: Config) -> Iterator[str]:
    if config.plan.pairs is not None:
        try:
            if AutoPairs.parse(config.plan.pairs) is None:
                plan = PairPlan.parse(config.plan.pairs, num_layers=_ANY_MODEL)
                plan.control(config.plan.kind, config.plan.remove)
        except UserError as error:
            yield str(error)
    if config.plan.kind == "merge" and config.tune == "full":
        yield "plan.kind 'merge': made anew from the base when it is loaded, which tune: full changes; use tune: lora"
    if config.plan.kind == "merge" and config.model.quantization:
        yield "plan.kind 'merge': 4-bit weights cannot be added up; use model.quantization: null"
    if config.tune == "full" and config.model.quantization:
        yield "tune 'full': quantised weights cannot be trained; use tune: lora, or model.quantization: null"


def _lora(config: Config) -> Iterator[str]:
    lora = config.lora
    init = lora.get("init_lora_weights", True)
    if init not in SAFE_INIT:
        yield f"lora.init_lora_weights {init!r}: {_TEACHER}; use true, gaussian, orthogonal or eva"
    if lora.get("bias", "none") != "none":
        yield f"lora.bias {lora['bias']!r}: {_TEACHER}; use none, or lora_bias: true"
    if lora["start_from"] and config.tune == "full":
        yield f"lora.start_from {lora['start_from']!r}: an adapter, and tune is full; use tune: lora, or leave it out"
    if lora["start_from"] == "heal" and lora["heal_tokens"] < config.train["max_length"]:
        row = f"less than one row of train.max_length {config.train['max_length']}"
        yield f"lora.heal_tokens {lora['heal_tokens']}: {row}; give some tens of thousands"
    if lora["start_from"] and init == "eva":
        yield f"lora.start_from {lora['start_from']!r}: replaces what init_lora_weights eva makes; leave one out"
    for name in lora.get("modules_to_save") or []:
        if name.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            yield f"lora.modules_to_save {name!r}: teacher and student share the head and embeddings; leave it out"
    targets = lora.get("target_modules")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield f"lora.target_modules {targets!r}: not a regular expression ({error}); write for example '.*_proj'"


def _loss(config: Config) -> Iterator[str]:
    if not (config.loss.kd or config.loss.ce or config.loss.hidden):
        yield "loss.kd, loss.ce, loss.hidden are all 0: nothing would be trained; set loss.kd 1.0"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.train == []:
        yield "data.train []: no source; give at least one, for example builtin:pydocs"
    if data.eval is None and data.eval_fraction < 1 <= data.eval_fraction + data.calibration_fraction:
        yield f"data.calibration_fraction {data.calibration_fraction}: with eval_fraction it leaves nothing to train on"
    for role in ("train", "eval", "calibration"):
        yield from _weights(getattr(data, role) or [], f"data.{role}")
    if any(s.streaming for s in data.train or []) and "num_train_epochs" in config.train:
        yield "train.num_train_epochs: a streamed source has no known length; give train.max_steps instead"


def _weights(sources: list[Source], where: str) -> Iterator[str]:
    weights = [s.weight for s in sources]
    if None in weights and any(w is not None for w in weights):
        yield f"{where}: source {weights.index(None)} has no weight and others have; give all of them one, or none"
    for i, weight in enumerate(weights):
        if weight is not None and not weight > 0:
            yield f"{where}.{i}.weight {weight}: a share is above 0; remove the source, or give for example 0.25"


def _train(config: Config) -> Iterator[str]:
    train = config.train
    given = [n for n in ("max_steps", "num_train_epochs") if n in train]
    if not given:
        yield "train.max_steps: missing; give train.max_steps or train.num_train_epochs"
    if len(given) == 2:
        yield "train.max_steps and train.num_train_epochs: both given; set one of them to null"
    yield from _during_training(config)
    tokens, length = train["global_batch_tokens"], train["max_length"]
    if tokens > 0 and length > 0 and tokens % length:
        low = max(tokens // length, 1) * length
        yield f"train.global_batch_tokens {tokens}: not a multiple of max_length {length}; use {low} or {low + length}"


def _during_training(config: Config) -> Iterator[str]:
    train, steps = config.train, config.train["task_steps"]
    if steps and not config.evaluate.tasks:
        yield f"train.task_steps {steps}: no tasks to measure; name some in evaluate.tasks, or set it to null"
    if steps and train["eval_steps"] > 0 and steps % train["eval_steps"]:
        near = max(1, round(steps / train["eval_steps"])) * train["eval_steps"]
        yield f"train.task_steps {steps}: not a multiple of eval_steps {train['eval_steps']}; use {near:g}"
    if train["early_stopping_patience"] and not train.get("load_best_model_at_end"):
        rule = "the result is that of the best checkpoint; set train.load_best_model_at_end: true"
        yield f"train.early_stopping_patience {train['early_stopping_patience']}: {rule}"
