"""Greedy answers of the variants of one model, and what is said of them, against plain loops."""

import contextlib
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from launched import ROOT, ends, start
from test_fidelity import with_adapter
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate_run
from lp_train.evaluation.fidelity import BUCKETS, Fidelity, Variant, as_it_is, measure
from lp_train.pairing import adapters_off, sequential
from run_evaluation import answers as held_out_answers
from run_evaluation.answers import Answers, answer_all, describe, prompts_of

VARIANTS: dict[str, Variant] = {"sequential": sequential, "paired": adapters_off, "recovered": as_it_is}
NEW = 12


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> nn.Module:
    tiny_llama.generation_config.repetition_penalty = 1.5  # a model's own habits do not belong in a comparison
    return with_adapter(tiny_llama).train()


@pytest.fixture
def prompts(model: nn.Module) -> torch.Tensor:
    return torch.randint(4, model.config.vocab_size, (7, 10), generator=torch.Generator().manual_seed(0))


def answers(model: nn.Module, tokenizer: Any, prompts: torch.Tensor, batch_size: int = 3) -> dict[str, Answers]:
    return answer_all(model, tokenizer, prompts, NEW, VARIANTS, batch_size, contextlib.nullcontext)


@torch.no_grad()
def greedy(model: nn.Module, prompt: torch.Tensor, end: int) -> list[int]:
    """Without cache, one token after the other."""
    tokens = prompt[None]
    while tokens.shape[1] < len(prompt) + NEW and (tokens.shape[1] == len(prompt) or tokens[0, -1] != end):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


def test_answers_are_measured_as_packed_rows(
    model: nn.Module, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the lengths that attention without masks needs to keep documents apart."""
    seen = []

    def spy(model: Any, rows: Any, collate: Any, *rest: Any) -> Any:
        seen.append(collate([rows[0]]))
        return measure(model, rows, collate, *rest)

    monkeypatch.setattr(held_out_answers, "measure", spy)
    answers(model, SimpleNamespace(eos_token_id=2, pad_token_id=3), prompts)
    assert seen[0]["cu_seq_lens"][-1] == seen[0]["input_ids"].numel()


@torch.no_grad()
def test_answers_are_those_of_plain_loops(model: nn.Module, prompts: torch.Tensor) -> None:
    model.eval()
    common = greedy(model, prompts[0], -1)[4]  # a token that comes: as the end token it ends answers early
    model.train()
    found = answers(model, SimpleNamespace(eos_token_id=common, pad_token_id=3), prompts)
    assert model.training
    model.eval()
    for name, variant in VARIANTS.items():
        with variant(model):
            assert found[name].tokens == [greedy(model, prompt, common) for prompt in prompts]
    assert any(len(answer) < NEW for answer in found["recovered"].tokens)
    for prompt, answer, along in zip(
        prompts, found["sequential"].tokens, found["recovered"].along_original.kl_sums, strict=True
    ):
        whole = torch.cat([prompt, torch.tensor(answer)])[None]
        with sequential(model):
            original = F.log_softmax(model(whole).logits.double(), -1)[0, len(prompt) - 1 : -1]
        ours = F.log_softmax(model(whole).logits.double(), -1)[0, len(prompt) - 1 : -1]
        assert along == pytest.approx(float((original.exp() * (original - ours)).sum()), rel=1e-4, abs=1e-5)


def flat(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{path}.{key}").items()}
    return {path: value} if isinstance(value, int | float) else {}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    config = tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl"))
    state = random.Random(1)
    long = tiny_run.write_lines(
        tmp_path / "long.jsonl", [{"text": f"{i} {tiny_run.sentences(state, 12)}"} for i in range(12)]
    )
    given = [str(config), f"data.eval={long}", "train.max_length=128", "evaluate.generation_prompts=3", "--output"]
    assert evaluate_run.main([*given, str(tmp_path / "1")]) == 0
    codes, output = ends(start([str(ROOT / "scripts" / "evaluate_run.py"), *given, str(tmp_path / "2")], 2))
    assert codes == [0, 0], output
    found = [json.loads((tmp_path / f"{world}" / "evaluation.json").read_text()) for world in (1, 2)]
    assert [document["environment"]["num_processes"] for document in found] == [1, 2]
    sections = ("fidelity", "fidelity_by_position", "fidelity_by_domain", "generation", "drift")
    alone, together = ({name: document[name] for name in sections} for document in found)
    assert alone["generation"]["prompts"] == 3
    assert flat(together) == pytest.approx(flat(alone), rel=1e-12)


# --- what is said of them


def described(original: list[list[int]], other: list[list[int]]) -> dict[str, float]:
    n = np.array([float(len(answer)) for answer in original])
    along = Fidelity(n, n, 0.5 * n, n, np.zeros((1, BUCKETS, 4)), np.zeros(1))
    given_to = {"sequential": Answers(original, along), "recovered": Answers(other, along)}
    return describe([given_to], NEW)["models"]["recovered"]


def test_figures_of_two_answers() -> None:
    found = described([[1, 2, 3, 4, 5, 6], [7, 7, 7]], [[1, 2, 9, 4, 5, 6], [7, 7, 7]])
    assert found["agreed_tokens"] == (2 + 3) / 2
    assert found["agreed_share"] == 5 / 9
    assert found["identical_answers"] == 0.5
    assert found["kl_on_original_answers"] == 0.5
    assert found["distinct_1"] == 7 / 9  # 1 2 9 4 5 6 7
    assert found["distinct_2"] == 6 / 7  # 7 7 twice
    assert found["repeated_4grams"] == 0
    again = described([[1]], [[1, 2, 3, 4, 1, 2, 3, 4]])
    assert again["repeated_4grams"] == pytest.approx(1 / 5) and again["agreed_tokens"] == 1


short = st.lists(st.integers(0, 3), min_size=1, max_size=9)


@given(st.lists(st.tuples(short, short), min_size=1, max_size=4))
def test_figures_of_any_answers(pairs: list[tuple[list[int], list[int]]]) -> None:
    original, other = (list(part) for part in zip(*pairs, strict=True))
    found = described(original, other)
    same = [len(list(itertools.takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=False)))) for a, b in pairs]
    assert found["agreed_tokens"] == pytest.approx(np.mean(same))
    bigrams = [tuple(b[i : i + 2]) for b in other for i in range(len(b) - 1)]
    assert found["distinct_2"] == (len(set(bigrams)) / len(bigrams) if bigrams else 1)
    fours = [[tuple(b[i : i + 4]) for i in range(len(b) - 3)] for b in other]
    seen_before = sum(four in of_answer[:i] for of_answer in fours for i, four in enumerate(of_answer))
    assert found["repeated_4grams"] == pytest.approx(seen_before / max(1, sum(map(len, fours))))


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 9))
def test_prompts_are_beginnings_of_documents(lengths: list[list[int]], count: int) -> None:
    numbers = itertools.count()
    rows = [{"input_ids": [next(numbers) for _ in range(sum(row))], "seq_lengths": row} for row in lengths]
    starts = [sum(sum(r) for r in lengths[:i]) + sum(row[:j]) for i, row in enumerate(lengths) for j in range(len(row))]
    long_enough = [s for s, n in zip(starts, itertools.chain(*lengths), strict=True) if n > 10]
    found = prompts_of(Dataset.from_list(rows), count, tokens=10)
    assert found.shape == (min(count, len(long_enough)), 10)
    assert set(found[:, 0].tolist()) <= set(long_enough) and len(set(found[:, 0].tolist())) == len(found)
    assert all(row.tolist() == list(range(row[0], row[0] + 10)) for row in found)
