"""The held-out text of one run and how it is measured: the same rows, precision and processes for every model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lp_train.config import Config
from lp_train.data import Data
from lp_train.evaluation.answers import answer
from lp_train.evaluation.drift import drift
from lp_train.evaluation.fidelity import Fidelity, Variant, measure
from lp_train.evaluation.generation import Answers, answer_all, prompts_of
from lp_train.pairing import sequential

DRIFT_ROWS = 32  # a mean over so many tokens hardly moves


@dataclass(frozen=True)
class Bench:
    config: Config
    data: Data
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    state: PartialState
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """As in training: float32 adapters beside half-precision weights compute in half precision."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.state.device.type, dtype=self.dtype if enabled else None, enabled=enabled)

    def training_batches(self, rows: int, count: int) -> Iterator[dict[str, Tensor]]:
        """The first batches of the training rows, without labels, on the run's device; every process has the same."""
        for start in range(0, min(rows * count, len(self.data.train)), rows):
            batch = self.collate([self.data.train[i] for i in range(start, min(start + rows, len(self.data.train)))])
            yield {name: batch[name].to(self.state.device) for name in ("input_ids", "position_ids")}

    def measure(self, model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, Fidelity]:
        """The original (``sequential``) and each variant on the run's held-out rows; all processes take part."""
        size, state = self.config.evaluate.batch_size, self.state
        return measure(
            model,
            self.data.eval,
            self.collate,
            size,
            variants,
            self.autocast,
            state.process_index,
            state.num_processes,
            len(self.data.domains),
        )

    def drift(self, model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, list[float]]:
        """After each pair, on the first ``DRIFT_ROWS`` held-out rows; all processes take part."""
        rows, state, size = self.data.eval, self.state, self.config.evaluate.batch_size
        mine = range(state.process_index, min(len(rows), DRIFT_ROWS), state.num_processes)
        batches = (self.collate([rows[i] for i in mine[start : start + size]]) for start in range(0, len(mine), size))
        on_device = ({name: tensor.to(state.device) for name, tensor in batch.items()} for batch in batches)
        return drift(model, on_device, variants, self.autocast)

    def generate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, variants: Mapping[str, Variant]
    ) -> dict[str, Answers]:
        """Greedy answers to the beginnings of held-out documents, of the original (``sequential``) and each variant."""
        options, state = self.config.evaluate, self.state
        prompts = prompts_of(self.data.eval, options.generation_prompts)
        if not len(prompts):
            return {}
        given = {"sequential": sequential, **variants}
        where = (options.batch_size, self.autocast, state.process_index, state.num_processes)
        return answer_all(model, tokenizer, prompts, options.generation_tokens, given, *where)

    def answers(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, variants: Mapping[str, Variant]
    ) -> dict[str, str]:
        """``evaluate.prompt`` answered by each variant, on the main process; empty without a prompt."""
        prompt = self.config.evaluate.prompt
        if prompt is None or not self.state.is_main_process:
            return {}
        found = {"prompt": prompt}
        for name, variant in variants.items():
            with variant(model), self.autocast():
                found[name] = answer(model, tokenizer, self.config.evaluate)
        return found
