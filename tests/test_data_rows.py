"""Masks, labels, packing and the collator: against masks made by hand, and against each document alone."""

import copy
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built_data import build_data
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices
from trl.chat_template_utils import qwen2_5_training_chat_template

from lp_train.config import DataConfig, Source
from lp_train.data import Data, RowCollator
from lp_train.data.rows import IGNORED, pack
from lp_train.data.sources import Document
from lp_train.data.tokens import Encoder, Tokens
from lp_train.errors import UserError

Build = Callable[..., Data]

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "Thanks.\n"},
    {"role": "assistant", "content": "Write to me again, please. \u00fc\u20ac"},
]
# The same conversation as pieces of text and whether they are trained, written by hand.
CHAT_PIECES = [
    ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False),
    ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", False),
    ("The capital of France is Paris.<|im_end|>", True),
    ("\n<|im_start|>user\nThanks.\n<|im_end|>\n<|im_start|>assistant\n", False),
    ("Write to me again, please. \u00fc\u20ac<|im_end|>", True),
    ("\n", False),
]
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def by_hand(tokenizer: Any, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Ids and labels of pieces tokenised one by one; the first token is never trained."""
    encoded = [(tokenizer(text, add_special_tokens=False)["input_ids"], trained) for text, trained in pieces]
    ids = [token for tokens, _ in encoded for token in tokens]
    labels = [token if trained else IGNORED for tokens, trained in encoded for token in tokens]
    return ids, [IGNORED, *labels[1:]]


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


@pytest.fixture
def build(tmp_path: Path, tiny_tokenizer: Any) -> Build:
    """Rows of the given documents, with a fixed plain text for evaluation."""
    held = write(tmp_path / "eval.jsonl", [{"text": "A held-out sentence that stands nowhere else."}])

    def run(
        rows: list[dict[str, Any]], truncate: bool = False, tokenizer: Any = tiny_tokenizer, **options: Any
    ) -> Data:
        config = DataConfig([write(tmp_path / "train.jsonl", rows)], [held], truncate=truncate)
        defaults = {"max_length": 256, "train_tokens": None, "eval_tokens": 500, "kd_on": "completion", "seed": 0}
        return build_data(config, tokenizer, **(defaults | options))

    return run


@pytest.fixture
def marked_tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = MARKED_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("marks", [False, True])
def test_labels_of_a_chat_equal_a_mask_made_by_hand(
    build: Build, tiny_tokenizer: Any, marked_tokenizer: Any, marks: bool
) -> None:
    tokenizer = marked_tokenizer if marks else tiny_tokenizer
    assert (Encoder(tokenizer).marked_template is not None) is marks
    row = build([{"messages": CHAT}], tokenizer=tokenizer).train[0]
    ids, labels = by_hand(tiny_tokenizer, CHAT_PIECES)
    assert row["input_ids"] == ids
    assert row["labels"] == labels
    assert row["seq_lengths"] == [len(ids)]


@pytest.mark.parametrize("marks", [False, True])
def test_of_a_conversational_prompt_nothing_is_trained(
    build: Build, tiny_tokenizer: Any, marked_tokenizer: Any, marks: bool
) -> None:
    tokenizer = marked_tokenizer if marks else tiny_tokenizer
    row = build([{"prompt": CHAT[:4], "completion": CHAT[4:]}], tokenizer=tokenizer).train[0]
    pieces = [(text, trained and number > 2) for number, (text, trained) in enumerate(CHAT_PIECES)]
    assert (row["input_ids"], row["labels"]) == by_hand(tiny_tokenizer, pieces)


def test_trl_knows_templates_and_marks_the_end_of_turn(tiny_tokenizer: Any) -> None:
    """The interface of TRL that masks rest on: a known template gets its variant with marks."""
    from trl.chat_template_utils import get_training_chat_template, qwen2_5_chat_template

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = qwen2_5_chat_template
    assert get_training_chat_template(tokenizer) == qwen2_5_training_chat_template
    (document,) = Encoder(tokenizer).encode([Document(messages=CHAT)])
    # TRL's marks include the line breaks around a turn: they are taken off again.
    ids, labels = by_hand(tokenizer, CHAT_PIECES)
    assert document.ids.tolist() == ids
    assert np.where(document.trained, document.ids, IGNORED).tolist() == labels


def test_labels_of_prompt_and_completion(build: Build, tiny_tokenizer: Any) -> None:
    row = build([{"prompt": "Question: where? Answer:", "completion": " in Paris."}]).train[0]
    pieces = [("Question: where? Answer:", False), (" in Paris.", True), (tiny_tokenizer.eos_token, True)]
    assert (row["input_ids"], row["labels"]) == by_hand(tiny_tokenizer, pieces)


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_labels_of_plain_text(build: Build, tiny_tokenizer: Any, end: str) -> None:
    row = build([{"text": "A parser reads tokens." + end}]).train[0]
    pieces = [("A parser reads tokens.", True), (tiny_tokenizer.eos_token, True)]
    assert (row["input_ids"], row["labels"]) == by_hand(tiny_tokenizer, pieces)


def test_kd_on_all_keeps_the_completion_labels_beside(build: Build) -> None:
    completion, everywhere = (build([{"messages": CHAT}], kd_on=kd_on) for kd_on in ("completion", "all"))
    row = everywhere.train[0]
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert row["ce_labels"] == completion.train[0]["labels"]
    assert set(everywhere.eval.column_names) == {*everywhere.train.column_names, "domain"}
    assert "ce_labels" not in completion.train.column_names
    plain = build([{"text": "Only plain text, so that both kinds of labels are the same."}], kd_on="all")
    assert "ce_labels" not in plain.train.column_names


@pytest.mark.parametrize("pattern", ["*.eval.jsonl.xz", None])
def test_held_out_tokens_know_the_file_that_they_come_from(
    tmp_path: Path, tiny_tokenizer: Any, pattern: str | None
) -> None:
    texts = {"tales": "The sea was calm and the story went on.", "code": "A parser reads tokens; a tree is a list."}
    for name, text in texts.items():
        lines = [json.dumps({"text": f"{text} {i} {text}"}) for i in range(6)]
        (tmp_path / f"{name}.eval.jsonl.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    held = [Source(str(tmp_path / pattern))] if pattern else [Source(str(p)) for p in sorted(tmp_path.glob("*.xz"))]
    config = DataConfig([write(tmp_path / "train.jsonl", [{"text": "Something else to learn."}])], held)
    options = {"max_length": 48, "train_tokens": None, "eval_tokens": 10_000, "kd_on": "completion", "seed": 0}
    data = build_data(config, tiny_tokenizer, **options)
    assert data.domains == ["code", "tales"] and "domain" not in data.train.column_names
    found = {name: 0 for name in texts}
    for row in data.eval:
        start = 0
        for length in row["seq_lengths"]:
            (place,) = set(row["domain"][start : start + length])
            piece = tiny_tokenizer.decode(row["input_ids"][start : start + length])
            assert ("sea" in piece) == (data.domains[place] == "tales")
            found[data.domains[place]] += 1
            start += length
    assert found == {"tales": 6, "code": 6}


words = st.lists(st.integers(4, 300), min_size=1, max_size=70)


@given(st.lists(words, min_size=1, max_size=12), st.integers(2, 40), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_packing_keeps_every_token_and_labels_all_but_first_ones(
    rows: list[list[int]], length: int, random: Any
) -> None:
    documents = [
        Tokens(np.array(ids, np.int32), np.array([random.random() < 0.5 for _ in ids]), masked=True) for ids in rows
    ]
    packed = pack(documents, length)
    pieces = [piece for row in packed for piece in split(row)]
    expected = [
        (tuple(d.ids[i : i + length]), (IGNORED, *np.where(d.trained, d.ids, IGNORED)[i + 1 : i + length]))
        for d in documents
        for i in range(0, len(d.ids), length)
    ]
    assert sorted(pieces) == sorted(expected)
    assert all(len(row["input_ids"]) <= length for row in packed)


def split(row: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    ends = np.cumsum(row["seq_lengths"])
    assert ends[-1] == len(row["input_ids"]) == len(row["labels"])
    return [
        (tuple(row["input_ids"][end - size : end]), tuple(row["labels"][end - size : end]))
        for end, size in zip(ends, row["seq_lengths"], strict=True)
    ]


def test_packing_more_documents_than_one_batch_of_the_library() -> None:
    documents = [Tokens(np.full(n % 7 + 1, n, np.int32), np.ones(n % 7 + 1, bool)) for n in range(2500)]
    packed = pack(documents, 16)
    ids = np.concatenate(packed["input_ids"])
    assert np.array_equal(np.bincount(ids), [n % 7 + 1 for n in range(2500)])


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_collator(lengths: list[list[int]], two_labels: bool) -> None:
    rows = [{"input_ids": list(range(1, sum(row) + 1)), "seq_lengths": row} for row in lengths]
    rows = [row | {"labels": [-token for token in row["input_ids"]]} for row in rows]
    rows = [row | {"ce_labels": row["labels"]} if two_labels else row for row in rows]
    batch = RowCollator(max_length=36, pad_token_id=0)(rows)
    trained, starts = batch.pop("trained"), batch.pop("cu_seq_lens")
    assert sorted(batch) == sorted(["input_ids", "labels", "position_ids"] + ["ce_labels"] * two_labels)
    assert trained.tolist() == [
        i for i in range(36 * len(rows) - 1) if (i + 1) % 36 and _label_at(batch, i + 1) != IGNORED
    ]
    sizes = [size for row in lengths for size in (*row, 36 - sum(row)) if size]
    assert starts.dtype == torch.int32 and starts.diff().tolist() == sizes and starts[0] == 0
    assert all(tensor.shape == (len(rows), 36) and tensor.dtype == torch.int64 for tensor in batch.values())
    for number, row in enumerate(rows):
        used = len(row["input_ids"])
        padding = [0] * (36 - used)
        assert batch["input_ids"][number].tolist() == row["input_ids"] + padding
        assert batch["labels"][number].tolist() == row["labels"] + [IGNORED] * (36 - used)
        positions = [position for size in row["seq_lengths"] for position in range(size)]
        assert batch["position_ids"][number].tolist() == positions + padding


def _label_at(batch: dict[str, torch.Tensor], place: int) -> int:
    return int(batch["labels"].flatten()[place])


def test_transformers_tells_documents_apart_by_positions() -> None:
    """Pins the private function that isolation rests on; padding tokens are each a document of their own."""
    batch = RowCollator(8, 0)([{"input_ids": [5] * 5, "labels": [5] * 5, "seq_lengths": [3, 2]}])
    found = find_packed_sequence_indices(batch["position_ids"])
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 1, 1, 2, 3, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_sees_only_itself(build: Build, tiny_llama: Any, tiny_tokenizer: Any, attention: str) -> None:
    tiny_llama.set_attn_implementation(attention)
    texts = ["A parser reads tokens from the stream. " * n for n in (1, 2, 3, 5)]
    data = build([{"text": text} for text in texts], max_length=96)
    assert max(map(len, data.train["seq_lengths"])) > 1
    batch = RowCollator(96, tiny_tokenizer.pad_token_id)(list(data.train))
    with torch.no_grad():
        logits = tiny_llama(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for number, row in enumerate(data.train):
            ends = np.cumsum(row["seq_lengths"])
            for end, size in zip(ends, row["seq_lengths"], strict=True):
                alone = tiny_llama(torch.tensor([row["input_ids"][end - size : end]]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[number, end - size : end], alone, atol=1e-5, rtol=1e-5)


def test_long_documents_are_split_and_nothing_is_lost(build: Build, tiny_tokenizer: Any) -> None:
    text = " ".join(f"word{n}" for n in range(200))
    data = build([{"text": text}], max_length=32)
    whole = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
    assert (data.stats.tokens, data.stats.dropped_tokens) == (len(whole), 0)
    assert sum(data.train["input_ids"], []) == whole
    pieces = sum(len(lengths) for lengths in data.train["seq_lengths"])
    assert data.stats.trained_tokens == len(whole) - pieces
    assert list(data.stats.sources.values()) == [len(whole)]


def test_truncation_is_asked_for_and_counted(build: Build, tiny_tokenizer: Any) -> None:
    text = " ".join(f"word{n}" for n in range(200))
    whole = len(tiny_tokenizer(text)["input_ids"]) + 1
    data = build([{"text": text}], max_length=32, truncate=True)
    assert data.train["input_ids"] == [tiny_tokenizer(text)["input_ids"][:32]]
    assert (data.stats.tokens, data.stats.dropped_tokens) == (32, whole - 32)


def test_tokens_lost_without_asking_are_an_error(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lp_train.data.rows.pack", lambda documents, length, *of_eval: pack([documents[0].cut(4)], length, *of_eval)
    )
    with pytest.raises(UserError, match=r"packing lost \d+\.\d% of the tokens"):
        build([{"text": "A parser reads tokens from the stream."}])


def test_mistakes(build: Build, tiny_tokenizer: Any) -> None:
    def tokenizer(**changes: Any) -> Any:
        changed = copy.deepcopy(tiny_tokenizer)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user goes first') }}{% endif %}"
    backwards = "{% for m in messages | reverse %}{{ m['role'] + m['content'] }}{% endfor %}"
    user_only = [{"role": "user", "content": "Hello?"}]
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([{"messages": user_only}], {}, "data.train: zero trained tokens"),
        ([{"text": "a b"}], {"tokenizer": tokenizer(eos_token=None)}, "no EOS token"),
        ([{"messages": CHAT}], {"tokenizer": tokenizer(chat_template=None)}, "no chat template"),
        ([{"messages": CHAT}], {"tokenizer": tokenizer(chat_template=refusing)}, "user goes first"),
        ([{"messages": CHAT}], {"tokenizer": tokenizer(chat_template=backwards)}, "differently alone"),
    ]
    for rows, options, words in cases:
        with pytest.raises(UserError, match=words) as error:
            build(rows, **options)
        assert "\n" not in str(error.value)
