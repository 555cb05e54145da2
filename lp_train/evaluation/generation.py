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

from lp_train.data.rows import IGNORED
from lp_train.evaluation.fidelity import Fidelity, Variant, measure, standard_error

PROMPT_TOKENS = 64
LONGEST_NGRAM = 4


@dataclass(frozen=True)
class Answers:
    """Of each prompt the greedy answer, up to the end token if it came, and how close the model stays to the original
    along the ORIGINAL's answers."""

    tokens: list[list[int]]
    along_original: Fidelity

    def as_dict(self) -> dict[str, float]:
        """``distinct_n``: different n-grams over all n-grams of all answers (Li et al. 2016, arXiv 1510.03055).
        ``repeated_4grams``: the share of 4-grams that stood in the same answer before."""
        found = {f"distinct_{n}": _distinct([_ngrams(self.tokens, n)]) for n in (1, 2, 3)}
        each = [_ngrams([answer], LONGEST_NGRAM) for answer in self.tokens]
        return found | {"repeated_4grams": 1 - _distinct(each)}


def describe(answers: Mapping[str, Answers], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The section of a report: each model's answers, and what they share with the original's (``sequential``)."""
    original = answers["sequential"].tokens
    models: dict[str, dict[str, float]] = {}
    for name, given in answers.items():
        models[name] = given.as_dict()
        if name == "sequential":
            continue
        agreed = [_agreed(a, b) for a, b in zip(original, given.tokens, strict=True)]
        along = given.along_original
        models[name] |= {
            "agreed_tokens": float(np.mean(agreed)),
            "agreed_share": sum(agreed) / sum(map(len, original)),
            "identical_answers": float(np.mean([a == b for a, b in zip(original, given.tokens, strict=True)])),
            "kl_on_original_answers": along.kl,
            "kl_standard_error": standard_error(along.kl_sums, along.tokens),
        }
    return {"prompts": len(original), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "models": models}


def prompts_of(rows: Sequence[Mapping[str, Any]], count: int, tokens: int = PROMPT_TOKENS) -> Tensor:
    """[P, tokens]: the beginnings of ``count`` documents, evenly spread over those that are longer than ``tokens``."""
    beginnings = []
    for row in rows:
        starts = [0, *itertools.accumulate(row["seq_lengths"])]
        for start, length in zip(starts[:-1], row["seq_lengths"], strict=True):
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
    """Answers of each variant, of which ``sequential`` must be the first, to prompts [P, T]; on every process all.

    Each process takes every ``world_size``-th prompt.
    """
    mine, was_training = prompts[rank::world_size], model.training
    model.eval()
    tokens: dict[str, list[list[int]]] = {}
    for name, variant in variants.items():
        with variant(model), autocast():
            found = [_generate(model, tokenizer, part, new_tokens) for part in mine.split(batch_size) if len(part)]
        numbered = zip(range(rank, len(prompts), world_size), itertools.chain(*found), strict=True)
        tokens[name] = [answer for _, answer in sorted(gather_object(list(numbered)))]
    model.train(was_training)
    pad = int(tokenizer.pad_token_id or 0)
    rows = [_row(prompt, answer, new_tokens, pad) for prompt, answer in zip(prompts, tokens["sequential"], strict=True)]
    others = {name: variant for name, variant in variants.items() if name != "sequential"}
    along = measure(model, rows, _stack, batch_size, others, autocast, rank, world_size)
    return {name: Answers(tokens[name], along[name]) for name in variants}


@torch.no_grad()
def _generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int
) -> list[list[int]]:
    inputs = prompts.to(next(model.parameters()).device)
    end, pad = tokenizer.eos_token_id, int(tokenizer.pad_token_id or 0)
    made = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=end,
        pad_token_id=pad,
    )[:, inputs.shape[1] :].tolist()
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in made]


def _row(prompt: Tensor, answer: list[int], new_tokens: int, pad: int) -> dict[str, Tensor]:
    """Prompt and answer as a row of :func:`measure`: the answer is what is measured."""
    padding = new_tokens - len(answer)
    tokens = torch.cat([prompt, torch.tensor(answer + [pad] * padding, dtype=torch.int64)])
    labels = tokens.clone()
    labels[: len(prompt)] = IGNORED
    labels[len(prompt) + len(answer) :] = IGNORED
    return {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(len(tokens))}


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _agreed(original: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    shorter = min(len(original), len(other))
    return next((i for i in range(shorter) if original[i] != other[i]), shorter)


def _ngrams(answers: Sequence[list[int]], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1))


def _distinct(counts: Sequence[Counter[tuple[int, ...]]]) -> float:
    """Different n-grams over all n-grams; 1 where there is none."""
    total = sum(count.total() for count in counts)
    return sum(map(len, counts)) / total if total else 1.0
