"""Greedy answers of each model to the same held-out prompts, because likelihood hides what happens in generation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lp_train.data.rows import IGNORED, RowCollator
from lp_train.evaluation.bench import Bench, generate
from lp_train.evaluation.fidelity import Fidelity, Variant, measure, shared_out, standard_error
from lp_train.pairing import sequential

PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Answers:
    """Of each prompt the greedy answer, up to the end token if it came, and how close the model stays to the original
    along the ORIGINAL's answers."""

    tokens: list[list[int]]
    along_original: Fidelity

    def as_dict(self, original: list[list[int]]) -> dict[str, float]:
        """``distinct_n``: different n-grams over all n-grams of all answers (Li et al. 2016, arXiv 1510.03055).
        ``repeated_4grams``: the share of 4-grams that stood in the same answer before. ``agreed_tokens``: those before
        the first difference to the original's answer."""
        agreed = list(map(_agreed, original, self.tokens))
        return {
            **{f"distinct_{n}": _distinct([_ngrams(self.tokens, n)]) for n in (1, 2, 3)},
            "repeated_4grams": 1 - _distinct([_ngrams([answer], 4) for answer in self.tokens]),
            "agreed_tokens": float(np.mean(agreed)),
            "agreed_share": sum(agreed) / sum(map(len, original)),
            "identical_answers": float(np.mean([a == b for a, b in zip(original, self.tokens, strict=True)])),
            "kl_on_original_answers": self.along_original.kl,
            "kl_standard_error": standard_error(self.along_original.kl_sums, self.along_original.tokens),
        }


def describe(runs: Sequence[Mapping[str, Answers]], new_tokens: int) -> dict[str, Any]:
    """The section of a report: figures of each model's answers, of several seeds their means."""
    original, models = runs[0]["sequential"].tokens, {}
    for model in runs[0]:
        seeds = [run[model].as_dict(original) for run in runs]
        models[model] = {name: float(np.mean([figures[name] for figures in seeds])) for name in seeds[0]}
    return {"prompts": len(original), "prompt_tokens": PROMPT_TOKENS, "new_tokens": new_tokens, "models": models}


def prompts_of(rows: Sequence[Mapping[str, Any]], count: int, tokens: int = PROMPT_TOKENS) -> Tensor:
    """[P, tokens]: the beginnings of ``count`` documents, evenly spread over those that are longer than ``tokens``."""
    beginnings = []
    for row in rows:
        starts = [0, *itertools.accumulate(row["seq_lengths"])]
        for start, length in zip(starts, row["seq_lengths"], strict=False):
            if length > tokens:
                beginnings.append(row["input_ids"][start : start + tokens])
    chosen = np.unique(np.linspace(0, len(beginnings) - 1, min(count, len(beginnings))).astype(int))
    return torch.tensor([beginnings[i] for i in chosen], dtype=torch.int64).view(-1, tokens)


def answer_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    new_tokens: int,
    variants: Mapping[str, Variant],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Answers]:
    """Answers of each variant, of which ``sequential`` must be the first, to prompts [P, T]; on every process all."""
    tokens: dict[str, list[list[int]]] = {}
    for name, variant in variants.items():
        found: list[tuple[int, list[int]]] = []
        for indices, counts in shared_out(len(prompts), batch_size, rank, world_size):
            with variant(model), autocast():
                made = generate(model, tokenizer, prompts[indices.start : indices.stop], new_tokens)
            found += zip(indices, made, strict=True) if counts else []
        tokens[name] = [answer for _, answer in sorted(gather_object(found))]
    rows = []
    for prompt, answer in zip(prompts.tolist(), tokens["sequential"], strict=True):
        labels = [IGNORED] * len(prompt) + answer  # the answer is what is measured
        rows.append({"input_ids": prompt + answer, "labels": labels, "seq_lengths": [len(labels)]})
    collate = RowCollator(prompts.shape[1] + new_tokens, int(tokenizer.pad_token_id or 0))
    others = {name: variant for name, variant in variants.items() if name != "sequential"}
    along = measure(model, rows, collate, batch_size, others, autocast, rank, world_size)
    return {name: Answers(tokens[name], along[name]) for name in variants}


def answer_held_out(bench: Bench, model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, Answers]:
    """Greedy answers to the beginnings of held-out documents, of the original (``sequential``) and each variant; empty
    without ``evaluate.generation_prompts`` or where all documents are too short."""
    options, where = bench.config.evaluate, (bench.state.process_index, bench.state.num_processes)
    prompts = prompts_of(bench.data.eval, options.generation_prompts)
    if not len(prompts):
        return {}
    given = {"sequential": sequential, **variants}
    how = (options.batch_size, bench.autocast, *where)
    return answer_all(model, bench.tokenizer, prompts, options.generation_tokens, given, *how)


def _agreed(original: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(original, other, strict=False)))


def _ngrams(answers: Sequence[list[int]], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1))


def _distinct(counts: Sequence[Counter[tuple[int, ...]]]) -> float:
    """Different n-grams over all n-grams; 1 where there is none."""
    total = sum(count.total() for count in counts)
    return sum(map(len, counts)) / total if total else 1.0
