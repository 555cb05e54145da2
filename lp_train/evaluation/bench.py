"""The held-out text of one run and how it is measured: the same rows, precision and processes for every model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lp_train.config import Config
from lp_train.data import Data
from lp_train.evaluation.fidelity import Fidelity, Variant, measure
from lp_train.evaluation.generation import answer


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

    def answers(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, variants: Mapping[str, Variant]
    ) -> dict[str, str]:
        """``evaluate.prompt`` answered by each variant, on every process; empty without a prompt."""
        options = self.config.evaluate
        if options.prompt is None:
            return {}
        found = {"prompt": options.prompt}
        for name, variant in variants.items():
            with variant(model), self.autocast():
                found[name] = answer(model, tokenizer, options.prompt, options.max_new_tokens)
        return found
