"""The held-out text of one run and how it is measured: the same rows, precision and processes for every model; greedy
answers beside it, because likelihood hides what happens in generation."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lp_train import models
from lp_train.adapters import autocast
from lp_train.cluster.shard import in_parts, inside
from lp_train.config import Config
from lp_train.data import Data, RowCollator
from lp_train.evaluation import report as reports
from lp_train.evaluation.fidelity import Fidelity, Variant, evaluating, measure
from lp_train.pairing import PairPlan


@dataclass(frozen=True)
class Bench:
    config: Config
    data: Data
    tokenizer: PreTrainedTokenizerBase
    state: PartialState

    @functools.cached_property
    def collate(self) -> RowCollator:
        return RowCollator(self.config.train["max_length"], self.tokenizer.pad_token_id)

    @property
    def dtype(self) -> torch.dtype:
        return models.resolve_dtype(self.config.model.dtype, self.state.device)

    def autocast(self) -> torch.autocast:
        """As in training."""
        return autocast(self.dtype, self.state.device)

    def training_batches(self, rows: int, count: int, where: torch.device | None = None) -> Iterator[dict[str, Tensor]]:
        """Batches of some training rows, without labels, on the run's device or ``where``; every process has the same.
        They are drawn: packed rows stand in the order of their documents' lengths."""
        order = np.random.default_rng(self.config.train["seed"]).permutation(len(self.data.train))[: rows * count]
        for start in range(0, len(order), rows):
            batch = self.collate([self.data.train[int(i)] for i in order[start : start + rows]])
            yield {name: batch[name].to(where or self.state.device) for name in ("input_ids", "position_ids")}

    def batches_of(self, tokens: int, where: torch.device | None = None) -> Iterator[dict[str, Tensor]]:
        """Whole batches of as many tokens of the training rows, as :meth:`training_batches`."""
        rows = min(max(1, tokens // self.config.train["max_length"]), len(self.data.train))
        size = min(rows, self.config.evaluate.batch_size)
        return self.training_batches(size, rows // size, where)

    def measure(self, model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, Fidelity]:
        """The original (``sequential``) and each variant on the run's held-out rows; all processes take part."""
        size, where = self.config.evaluate.batch_size, (self.state.process_index, self.state.num_processes)
        domains = len(self.data.domains)
        return measure(model, self.data.eval, self.collate, size, variants, self.autocast, *where, domains)

    def answers(self, model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, str]:
        """``evaluate.prompt`` answered by each variant, on every process; empty without a prompt."""
        options = self.config.evaluate
        if options.prompt is None:
            return {}
        found = {"prompt": options.prompt}
        for name, variant in variants.items():
            with variant(model), self.autocast():
                found[name] = answer(model, self.tokenizer, options.prompt, options.max_new_tokens)
        return found

    def report(self, plan: PairPlan, figures: Mapping[str, Fidelity]) -> dict[str, Any]:
        """What every ``report.json`` has, however the adapters were made."""
        return {
            "name": self.config.name,
            "tune": self.config.tune,
            "plan": reports.plan_section(plan, self.config.plan.algebra),
            "effective_depth": plan.effective_depth,
            **{name: fidelity.as_dict() for name, fidelity in figures.items()},
            **reports.fidelity_sections(figures, plan, self.data.domains),
            "data": asdict(self.data.stats),
            "environment": reports.environment(self.state.device),
        }


def answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """The model's greedy continuation of a prompt, a chat turn where the tokenizer has a chat template."""
    text: Any = prompt
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return str(tokenizer.decode(generate(model, tokenizer, inputs, new_tokens)[0], skip_special_tokens=True))


def generate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy answers to prompts [B, T], each up to its end token, with a cache and without a model's own penalties."""
    inputs = prompts.to(next(model.parameters()).device)
    end = tokenizer.eos_token_id
    with evaluating(model):
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": end}
        options |= {"max_new_tokens": new_tokens, "pad_token_id": int(tokenizer.pad_token_id or 0)}
        options["synced_gpus"] = True if in_parts(model) and dist.is_initialized() else None
        greedy = functools.partial(model.generate, input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
        made = inside(model, greedy)[:, inputs.shape[1] :].tolist()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in made]
