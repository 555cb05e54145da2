"""Speed of tasks: lm-eval over our model object, and the bare model over the same inputs in the same batches."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.training import origin
from lp_train import models
from lp_train.config import Config
from lp_train.evaluation.fidelity import Variant
from lp_train.evaluation.harness import Batch, HarnessModel
from lp_train.evaluation.tasks import Suite, load_suite
from lp_train.finetune import check_model
from lp_train.pairing import adapters_off, pair_layers, sequential
from lp_train.pairing.families import decoder_of

VARIANTS: dict[str, Variant] = {"sequential": sequential, "paired": adapters_off}


def run(config: Config, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens per second of each task of ``evaluate.tasks``; a token counts once for each variant that it goes through.

    ``harness``: both variants in one run, from texts to log-likelihoods (building the prompts is ``build_seconds``).
    ``decoder`` and ``logits``: the same batches through the bare decoder, and through the model to all logits.
    Everything is warm: of each measurement the best of ``repeats``, which take turns.
    """
    state = PartialState(cpu=models.device().type == "cpu")
    dtype = models.resolve_dtype(config.model.dtype, state.device)
    tokenizer = models.load_tokenizer(config.model)
    model = pair_layers(models.load_base(config.model, state.device), check_model(config), config.plan.algebra)
    tasks = {}
    for name in config.evaluate.tasks:
        started = time.perf_counter()
        suite = load_suite(dataclasses.replace(config.evaluate, tasks=[name]))
        built = time.perf_counter() - started
        tasks[name] = {**_measure(model, tokenizer, suite, dtype, state, repeats), "build_seconds": built}
        say(f"{name}: {tasks[name]}")
    return {"config": config.name, "dtype": str(dtype), "tasks": tasks} | origin(state.device)


class _Recorder(HarnessModel):
    """Keeps the batches instead of running them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[Batch] = []

    def _score_all(self, batches: list[Batch], requests: int) -> dict[str, torch.Tensor]:
        self.batches += batches
        return {name: torch.zeros(requests, 2) for name in self.variants}


def _measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    dtype: torch.dtype,
    state: PartialState,
    repeats: int,
) -> dict[str, Any]:
    instances = [i for built in suite.tasks.values() for of_item in built.instances for i in of_item]

    def harness(variants: Mapping[str, Variant]) -> HarnessModel:
        lm = HarnessModel(model, tokenizer, variants, dtype, state)
        lm.loglikelihood(instances)
        return lm

    recorder = _Recorder(model, tokenizer, {"sequential": sequential}, dtype, state)
    recorder.loglikelihood(instances)

    @torch.no_grad()
    def bare(variant: Variant, logits: bool) -> None:
        run = model if logits else decoder_of(model)
        with variant(model), recorder._autocast():
            for batch in recorder.batches:
                run(input_ids=batch.input_ids.to(state.device), use_cache=False)

    def seconds(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    tokens = recorder.tokens
    calls: dict[Any, Callable[[], Any]] = {"both": lambda: harness(VARIANTS)}
    calls |= {("alone", name): functools.partial(harness, {name: variant}) for name, variant in VARIANTS.items()}
    for what, logits in (("decoder", False), ("logits", True)):
        calls |= {(what, name): functools.partial(bare, variant, logits) for name, variant in VARIANTS.items()}
    rounds = [{key: seconds(call) for key, call in calls.items()} for _ in range(repeats + 1)]  # the first warms up
    best = {key: min(times[key] for times in rounds[1:]) for key in calls}
    both = 2 * tokens / best["both"]
    alone, decoder, whole = ({n: best[what, n] for n in VARIANTS} for what in ("alone", "decoder", "logits"))
    return {
        "items": sum(len(built.docs) for built in suite.tasks.values()),
        "requests": len(instances),
        "tokens": tokens,
        "harness": both,
        "harness_alone": {name: tokens / value for name, value in alone.items()},
        "decoder": 2 * tokens / sum(decoder.values()),
        "logits": 2 * tokens / sum(whole.values()),
        "of_decoder": both * sum(decoder.values()) / (2 * tokens),
        "of_logits": both * sum(whole.values()) / (2 * tokens),
        "paired_over_sequential": {
            "harness": alone["paired"] / alone["sequential"],
            "decoder": decoder["paired"] / decoder["sequential"],
        },
    }
