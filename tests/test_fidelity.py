"""The held-out figures against whole logits of whole forwards, and what a measurement must leave alone."""

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from lp_train.data import RowCollator
from lp_train.evaluation import fidelity
from lp_train.evaluation.fidelity import (
    BUCKETS,
    Fidelity,
    as_it_is,
    by_domain,
    by_position,
    evaluating,
    measure,
    shared_out,
    standard_error,
)
from lp_train.evaluation.report import gap, recovery
from lp_train.pairing import adapters_off, pair_layers, sequential

LENGTH, ROWS = 24, 7
COLLATE = RowCollator(LENGTH, pad_token_id=3)
FIGURES = ("tokens", "nll_sums", "kl_sums", "agreements")
VARIANTS = {"paired": adapters_off, "recovered": as_it_is}


def packed_rows(vocab: int, rows: int = ROWS) -> Dataset:
    """Rows of two or three documents with unequal numbers of trained tokens; the third row has none."""
    draw = np.random.default_rng(0)
    table: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for row in range(rows):
        lengths = [5 + row % 4, 7] + [6] * (row % 2)
        ids = draw.integers(4, vocab, sum(lengths))
        labels = np.where(draw.random(len(ids)) < 0.3 + 0.1 * (row % 5), ids, -100)
        labels[np.cumsum([0, *lengths[:-1]])] = -100
        if row == 2:
            labels[:] = -100
        for name, values in zip(table, (ids, labels, lengths), strict=True):
            table[name].append([int(value) for value in values])
    return Dataset.from_dict(table)


def with_adapter(model: nn.Module) -> nn.Module:
    """Paired in the middle, with adapters that change the output and a dropout that would be seen."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3], lora_dropout=0.5)
    peft = get_peft_model(pair_layers(model, "2:4"), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in peft.parameters():  # larger than at the start, so that the models differ
        if parameter.ndim > 1:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return peft


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> nn.Module:
    return with_adapter(tiny_llama).train()


@pytest.fixture
def rows(model: nn.Module) -> Dataset:
    return packed_rows(model.config.vocab_size)


@torch.no_grad()
def naive_tokens(
    model: nn.Module, row: dict[str, Any], original: Callable[[nn.Module], Any] = sequential
) -> list[tuple[int, int, np.ndarray]]:
    """Of each measured token of a row: number of its document, place in it, and (1, NLL, KL, agreement); document by
    document, without packing or padding, from whole logits in float64."""
    found, start = [], 0
    for document, length in enumerate(row["seq_lengths"]):
        ids, labels = (torch.tensor([row[name][start : start + length]]) for name in ("input_ids", "labels"))
        start += length
        ours = F.log_softmax(model(ids).logits.double(), -1)[0]
        with original(model):
            theirs = F.log_softmax(model(ids).logits.double(), -1)[0]
        for t in range(length - 1):
            label = int(labels[0, t + 1])
            if label == -100:
                continue
            divergence = sum(float(p * (p.log() - q)) for p, q in zip(theirs[t].exp(), ours[t], strict=True))
            figures = (1.0, -float(ours[t, label]), divergence, float(ours[t].argmax() == theirs[t].argmax()))
            found.append((document, t + 1, np.array(figures)))
    return found


def naive(model: nn.Module, row: dict[str, Any], original: Callable[[nn.Module], Any] = sequential) -> np.ndarray:
    return sum((figures for *_, figures in naive_tokens(model, row, original)), np.zeros(4))


def as_array(figures: Fidelity) -> np.ndarray:
    return np.stack([getattr(figures, name) for name in FIGURES], 1)


def test_by_position_and_by_domain(tiny_llama: LlamaForCausalLM) -> None:
    """The documents of a row are of domains b, c, b; 40 tokens reach into the third bucket."""
    tiny_llama.config.max_position_embeddings = 64
    model, draw = with_adapter(tiny_llama).eval(), np.random.default_rng(1)
    lengths = [[40, 9, 3], [20, 32]]
    ids = [draw.integers(4, model.config.vocab_size, 52).tolist() for _ in lengths]
    labels = [[-100 if i % 5 == 0 else token for i, token in enumerate(row)] for row in ids]
    for row, of_row in zip(labels, lengths, strict=True):
        for start in np.cumsum([0, *of_row[:-1]]):
            row[start] = -100
    domain = [[[1, 2, 1][d] for d, n in enumerate(of_row) for _ in range(n)] for of_row in lengths]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels, "seq_lengths": lengths, "domain": domain})
    found = measure(model, rows, RowCollator(56, 3), 2, VARIANTS, domains=3)
    spans, names = {(1, 15): [], (16, 31): [], (32, 63): []}, {"b": [], "c": []}
    for row in rows:
        for document, place, figures in naive_tokens(model, row):
            next(of for (low, high), of in spans.items() if low <= place <= high).append(figures)
            names["bcb"[document]].append(figures)
    by_place, of_domain = by_position(found), by_domain(found, ["a", "b", "c"])
    assert [(b["from"], b["to"]) for b in by_place["buckets"]] == list(spans)
    assert [d["domain"] for d in of_domain["domains"]] == ["b", "c"]  # none is of domain a
    for section, expected in zip(
        [*by_place["buckets"], *of_domain["domains"]], [*spans.values(), *names.values()], strict=True
    ):
        tokens, nll, kl, agreements = np.sum(expected, axis=0)
        assert section["tokens"] == tokens
        assert list(section["models"]) == ["sequential", "paired", "recovered"]
        assert section["models"]["recovered"] == pytest.approx(
            {"nll": nll / tokens, "kl": kl / tokens, "top1_agreement": agreements / tokens}, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_figures_equal_those_from_whole_logits(model: nn.Module, rows: Dataset, batch_size: int) -> None:
    found = measure(model, rows, COLLATE, batch_size, VARIANTS)
    assert list(found) == ["sequential", "paired", "recovered"]
    model.eval()
    for name, variant in {"sequential": sequential, **VARIANTS}.items():
        with variant(model):
            expected = np.array([naive(model, row) for row in rows])
        np.testing.assert_allclose(as_array(found[name]), expected, rtol=1e-4, atol=1e-4)
        figures, (tokens, nll, kl, agreements) = found[name].as_dict(), expected.sum(0)
        assert figures == pytest.approx(
            {
                "nll": nll / tokens,
                "ppl": math.exp(nll / tokens),
                "kl": kl / tokens,
                "top1_agreement": agreements / tokens,
            },
            abs=1e-5,
            rel=1e-4,
        )
    assert found["sequential"].kl == 0 and found["sequential"].as_dict()["top1_agreement"] == 1
    assert found["paired"].kl > 0.01 and found["recovered"].kl != found["paired"].kl


def test_chunks_of_the_head_do_not_change_the_figures(
    model: nn.Module, rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(model, rows, COLLATE, 4, VARIANTS)
    monkeypatch.setattr(fidelity, "rows_per_chunk", lambda device: 3)
    pieces = measure(model, rows, COLLATE, 4, VARIANTS)
    for name in whole:
        np.testing.assert_allclose(as_array(pieces[name]), as_array(whole[name]), rtol=1e-6, atol=1e-6)


def test_without_variants_only_the_original_is_measured(model: nn.Module, rows: Dataset) -> None:
    assert list(measure(model, rows, COLLATE, 4, {})) == ["sequential"]


@pytest.mark.parametrize("world_size", [2, 3, 9])  # nine processes: two have no row
def test_rows_shared_out_over_processes_have_the_same_figures(model: nn.Module, rows: Dataset, world_size: int) -> None:
    alone = measure(model, rows, COLLATE, 2, VARIANTS)
    forwards: list[int] = []
    hook = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    parts, counts = [], []
    for rank in range(world_size):  # here each process gets back its own part only, the other rows are zero
        forwards.clear()
        parts.append(measure(model, rows, COLLATE, 2, VARIANTS, rank=rank, world_size=world_size))
        counts.append(len(forwards))
    hook.remove()
    assert len(set(counts)) == 1  # sharded weights need all processes in every forward
    for name, whole in alone.items():
        assert np.array_equal(sum(as_array(part[name]) for part in parts), as_array(whole))
        assert np.array_equal(sum(part[name].cells for part in parts), whole.cells)


@pytest.mark.parametrize(("count", "size", "world"), [(7, 2, 3), (8, 4, 2), (1, 8, 4), (0, 8, 2)])
def test_batches_are_shared_out_evenly(count: int, size: int, world: int) -> None:
    shares = [list(shared_out(count, size, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = sorted(i for share in shares for batch, counts in share if counts for i in batch)
    assert counted == list(range(count))


def random_states() -> tuple[Any, ...]:
    """Of Python, NumPy and PyTorch."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("training", [True, False])
def test_mode_random_state_and_weights_come_back(model: nn.Module, rows: Dataset, training: bool) -> None:
    model.train(training)
    model.get_base_model().model.layers[1].eval()  # as someone may want it
    modes = [module.training for module in model.modules()]
    before, states = [p.clone() for p in model.parameters()], random_states()
    measure(model, rows, COLLATE, 4, VARIANTS)
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_evaluating_gives_modes_and_random_state_back_after_a_mistake_too(model: nn.Module) -> None:
    model.train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with pytest.raises(RuntimeError), evaluating(model):  # a task of the hub may sample
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        raise RuntimeError
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_while_measuring(model: nn.Module, rows: Dataset) -> None:
    first, second = (measure(model.train(), rows, COLLATE, 4, VARIANTS)["recovered"] for _ in range(2))
    assert np.array_equal(as_array(first), as_array(second))


def test_autocast_is_entered_for_every_batch(model: nn.Module, rows: Dataset) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            entered.append("in")
            yield

    half = measure(model, rows, COLLATE, 4, VARIANTS, autocast)["recovered"]
    assert len(entered) == 2
    assert half.nll != (full := measure(model, rows, COLLATE, 4, VARIANTS)["recovered"].nll)
    assert half.nll == pytest.approx(full, abs=0.05)


# --- recovery and standard errors


def figures(nll: Sequence[float], kl: Sequence[float], tokens: int = 100) -> Fidelity:
    """Rows of the same number of tokens with these means per token."""
    n = np.full(len(nll), float(tokens))
    return Fidelity(n, np.array(nll) * n, np.array(kl) * n, n, np.zeros((1, BUCKETS, 4)), np.zeros(1))


ORIGINAL = figures([2.0, 3.0, 2.5, 2.2], [0.0] * 4)


def test_recovery_is_the_share_of_the_gap() -> None:
    paired = figures([2.5, 3.6, 3.0, 2.6], [0.4, 0.5, 0.6, 0.5])
    recovered = figures([2.1, 3.1, 2.7, 2.3], [0.2, 0.1, 0.3, 0.2])
    gap_nll = (0.5 + 0.6 + 0.5 + 0.4) / 4
    assert gap(ORIGINAL, paired)["nll"] == pytest.approx(gap_nll)
    assert gap(ORIGINAL, paired)["kl"] == pytest.approx(0.5)
    expected = {"nll": (gap_nll - (0.1 + 0.1 + 0.2 + 0.1) / 4) / gap_nll, "kl": (0.5 - 0.2) / 0.5}
    assert recovery(ORIGINAL, paired, recovered) == pytest.approx(expected)
    assert recovery(ORIGINAL, paired, paired) == {"nll": 0, "kl": 0}
    assert recovery(ORIGINAL, paired, ORIGINAL) == pytest.approx({"nll": 1, "kl": 1})


def test_recovery_is_null_below_two_standard_errors_of_the_gap() -> None:
    noise = np.array([1.0, -1.0, 1.0, -1.0])
    error = np.std(noise, ddof=1) / 2  # of the mean of four rows
    for gap_size, judged in ((1.9 * error, False), (2.1 * error, True)):
        paired = figures(np.array([2.0, 3.0, 2.5, 2.2]) + gap_size + noise, 0.5 + np.zeros(4))
        found = recovery(ORIGINAL, paired, ORIGINAL)
        assert (found["nll"] is not None) == judged
        assert found["kl"] == pytest.approx(1)
    better = figures([1.0, 2.0, 1.5, 1.2], [0.1] * 4)  # pairing that helps leaves no gap to win back
    assert recovery(ORIGINAL, better, ORIGINAL)["nll"] is None


def test_recovery_is_null_without_any_gap_and_for_a_single_row() -> None:
    assert recovery(ORIGINAL, ORIGINAL, ORIGINAL) == {"nll": None, "kl": None}
    one, worse = figures([2.0], [0.0]), figures([3.0], [1.0])
    assert recovery(one, worse, one) == {"nll": None, "kl": None}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30), st.integers(1, 1000))
def test_standard_error_of_equal_rows_is_that_of_a_mean(means: list[float], tokens: int) -> None:
    x = np.array(means)
    expected = np.std(x, ddof=1) / math.sqrt(len(x))
    assert standard_error(x * tokens, np.full(len(x), tokens)) == pytest.approx(expected, abs=1e-12)


def test_standard_error_of_unequal_rows_is_that_of_a_bootstrap() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 1000, 200)
    sums = tokens * draw.normal(2.0, 0.5, 200)
    picks = draw.integers(0, 200, (4000, 200))
    bootstrap = np.std(sums[picks].sum(1) / tokens[picks].sum(1))
    assert standard_error(sums, tokens) == pytest.approx(bootstrap, rel=0.05)


def test_perplexity_of_a_ruined_model_is_a_number() -> None:
    assert figures([900.0, 900.0], [800.0, 800.0]).as_dict()["ppl"] == math.exp(700)


def test_a_row_without_a_trained_token_counts_for_nothing(model: nn.Module, rows: Dataset) -> None:
    found = measure(model, rows, COLLATE, 4, VARIANTS)["recovered"]
    assert as_array(found)[2].tolist() == [0.0] * 4
    rest = measure(model, rows.select([i for i in range(ROWS) if i != 2]), COLLATE, 4, VARIANTS)["recovered"]
    assert rest.as_dict() == pytest.approx(found.as_dict(), rel=1e-5)
