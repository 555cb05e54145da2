"""Reading sources: every local format, columns, roles kept apart, mixtures, and one line for every mistake."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built_data import build_data
from hypothesis import given
from hypothesis import strategies as st

from lp_train.config import DataConfig, Source
from lp_train.data import Data
from lp_train.data.mixture import separate
from lp_train.data.sources import Document, is_local, open_source
from lp_train.data.tokens import Encoder, Tokens
from lp_train.errors import UserError

Build = Callable[..., Data]

SENTENCE = "the parser reads tokens from a stream and returns the tree that they describe"
WORDS = SENTENCE.split()


def texts(count: int, tag: str = "") -> list[str]:
    """Different texts of about 25 words."""
    return [f"{tag} document {n}: " + " ".join(WORDS[(n + i) % len(WORDS)] for i in range(20)) for n in range(count)]


def write(path: Path, rows: list[Any]) -> str:
    """Writes rows in the format that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".xz", ".gz"):
        compress = lzma.compress if path.suffix == ".xz" else gzip.compress
        path.write_bytes(compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


def text_file(path: Path, count: int, tag: str = "") -> str:
    return write(path, [{"text": text} for text in texts(count, tag)])


@pytest.fixture
def build(tiny_tokenizer: Any) -> Build:
    def run(data: DataConfig, **options: Any) -> Data:
        defaults = {"max_length": 64, "train_tokens": None, "eval_tokens": 500, "kd_on": "completion", "seed": 0}
        return build_data(data, tiny_tokenizer, **(defaults | options))

    return run


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.xz", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [{"text": text, "other": 1} for text in texts(5)]
    source = open_source(Source(write(tmp_path / name, rows)), "train")
    assert [source.tables[0][1][n] for n in range(5)] == rows
    assert sorted(document.text for document in source.shuffled(0)) == sorted(texts(5))


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    source = open_source(Source(str(tmp_path / "a.json")), "train")
    assert sorted(document.text for document in source.shuffled(0)) == ["a", "b"]


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".txt.gz", gzip.open), (".txt.xz", lzma.open)])
def test_a_txt_file_is_one_document(tmp_path: Path, suffix: str, opener: Callable[..., Any]) -> None:
    for name in "ab":
        with opener(tmp_path / (name + suffix), "wt", encoding="utf-8") as file:
            file.write(f"{name}\n\nsecond paragraph")
    source = open_source(Source(str(tmp_path / f"*{suffix}")), "train")
    assert sorted(d.text for d in source.shuffled(0)) == ["a\n\nsecond paragraph", "b\n\nsecond paragraph"]


@pytest.mark.parametrize("path", ["./x", "/x/y", "~/x", "x/*.gz", "data/a.jsonl", "a.parquet", "a.txt.xz"])
def test_paths_that_mean_files(path: str) -> None:
    assert is_local(path)


@pytest.mark.parametrize("path", ["wikitext", "allenai/c4", "HuggingFaceTB/smoltalk2.1"])
def test_paths_that_mean_the_hub(path: str) -> None:
    assert not is_local(path)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "a", "id": 3}, {}, Document("a")),
        ({"body": "a", "text": "b"}, {"text_column": "body"}, Document("a")),
        ({"prompt": "p", "completion": "c", "text": "no"}, {}, Document("c", prompt="p")),
        ({"messages": CHAT, "text": "no"}, {}, Document(messages=CHAT)),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}, Document(messages=CHAT, context=1)),
    ],
)
def test_columns_are_found_or_named(tmp_path: Path, row: dict[str, Any], options: Any, expected: Document) -> None:
    source = open_source(Source(write(tmp_path / "a.jsonl", [row]), **options), "train")
    assert list(source.shuffled(0)) == [expected]


def test_files_of_different_forms_under_one_pattern(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a"}, {"messages": CHAT}])
    write(tmp_path / "b.jsonl", [{"messages": CHAT[:1]}])
    found = list(open_source(Source(str(tmp_path / "*.jsonl")), "train").shuffled(0))
    assert sorted(len(document.messages) for document in found) == [0, 1, 2]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=5))
def test_the_key_ignores_whitespace_and_form(parts: list[str]) -> None:
    key = Document(" ".join(parts)).key
    assert Document("\n\t ".join(parts) + "\n").key == key
    assert Document(messages=[{"role": "user", "content": part} for part in parts]).key == key
    assert Document(" ".join(parts) + "x y").key != key


def test_held_out_documents_are_stable_and_not_trained(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.jsonl", 400)
    views = [separate(DataConfig([Source(p)], eval_fraction=0.1)) for p in (path, path)]
    evaluation, train = ({d.key for d in part[0].shuffled(0)} for part in (views[0].eval, views[0].train))
    assert not evaluation & train
    assert len(evaluation | train) == 400
    assert 20 < len(evaluation) < 60
    # A reordered copy of the file holds out the same documents.
    copy = write(tmp_path / "b.jsonl", [{"text": text} for text in reversed(texts(400))])
    again = separate(DataConfig([Source(copy)], eval_fraction=0.1))
    assert {d.key for d in again.eval[0].shuffled(1)} == evaluation


@pytest.mark.parametrize("streaming", [False, True])
def test_train_eval_and_calibration_are_disjoint(tmp_path: Path, streaming: bool) -> None:
    train, held, calibration = texts(40, "t"), texts(10, "e"), texts(10, "c")
    spaced = [text.replace(" ", "  ") for text in held[:4]] + calibration[:3]
    paths = [
        write(tmp_path / f"{name}.jsonl", [{"text": text} for text in part])
        for name, part in (("t", train + spaced), ("e", held + calibration[5:6]), ("c", calibration))
    ]
    config = DataConfig([Source(paths[0])], [Source(paths[1], streaming=streaming)], [Source(paths[2])])
    views = separate(config)
    keys = {"eval": {d.key for d in views.eval[0].shuffled(0)}, "train": {d.key for d in views.train[0].shuffled(0)}}
    assert keys["train"] == {Document(text).key for text in train}
    assert keys["eval"] == {Document(text).key for text in held}
    assert len(views.excluded) == 7


@pytest.mark.parametrize("given_eval", [False, True])
def test_a_share_of_the_training_documents_is_kept_for_calibration(tmp_path: Path, given_eval: bool) -> None:
    path, held = text_file(tmp_path / "a.jsonl", 400), None
    if given_eval:  # a part of the training documents is also evaluated
        held = [Source(write(tmp_path / "e.jsonl", [{"text": text} for text in texts(400)[::5]]))]
    shares = {}
    for fraction in (0.0, 0.1):
        views = separate(DataConfig([Source(path)], held, eval_fraction=0.1, calibration_fraction=fraction))
        roles = {"eval": views.eval, "train": views.train, "calibration": views.calibration}
        shares[fraction] = {role: {d.key for d in found[0].shuffled(0)} for role, found in roles.items()}
    none, some = shares[0.0], shares[0.1]
    assert not none["calibration"] and 15 < len(some["calibration"]) < 60
    assert some["eval"] == none["eval"] and some["train"] == none["train"] - some["calibration"]
    assert not some["calibration"] & some["eval"] and some["calibration"] < none["train"]


def test_calibration_documents_that_are_given_are_used_as_they_are(tmp_path: Path) -> None:
    paths = [Source(text_file(tmp_path / f"{name}.jsonl", 60, name)) for name in "tc"]
    views = separate(DataConfig(paths[:1], None, paths[1:], calibration_fraction=0.5))
    assert {d.key for d in views.calibration[0].shuffled(0)} == {Document(text).key for text in texts(60, "c")}
    train = {d.key for d in views.train[0].shuffled(0)} | {d.key for d in views.eval[0].shuffled(0)}
    assert train == {Document(text).key for text in texts(60, "t")}  # no share of them is kept back


def test_what_was_excluded_is_counted(tmp_path: Path, build: Build) -> None:
    train = text_file(tmp_path / "t.jsonl", 30)
    held = write(tmp_path / "e.jsonl", [{"text": text} for text in texts(5)])
    stats = build(DataConfig([Source(train)], [Source(held)])).stats
    assert (stats.documents, stats.excluded_documents) == (25, 5)


def test_pydocs_holds_documents_out_like_any_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lp_train.data.sources.load_pydocs", lambda: [{"text": text} for text in texts(50)])
    pydocs = [Source("builtin:pydocs")]
    views = separate(DataConfig(pydocs, eval_fraction=0.3))
    train, held = ({d.text for d in part[0].shuffled(0)} for part in (views.train, views.eval))
    assert train and held and not train & held and train | held == set(texts(50))
    with pytest.raises(UserError) as error:
        separate(DataConfig(pydocs, pydocs))
    one_line(error, "builtin:pydocs is also in data.eval", "leave data.eval out")


def test_reading_stops_when_there_is_enough(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [text_file(tmp_path / f"{name}.jsonl", count, name) for name, count in (("t", 2000), ("e", 5))]
    sizes: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, documents: list[Document]) -> list[Tokens]:
        sizes.append(len(documents))
        return encode(self, documents)

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr("lp_train.data.tokens._BATCH_DOCUMENTS", 8)
    stats = build(DataConfig([Source(paths[0])], [Source(paths[1])]), train_tokens=300).stats
    assert 300 <= stats.tokens < 450
    assert sum(sizes) <= stats.documents + 5 + 8


def test_streaming_reads_the_same_documents(tmp_path: Path, build: Build) -> None:
    for name in "ab":
        text_file(tmp_path / f"{name}.jsonl", 50, name)
    whole, streamed = (
        build(DataConfig([Source(str(tmp_path / "*.jsonl"), streaming=streaming)], eval_fraction=0.2))
        for streaming in (False, True)
    )
    assert (whole.stats.documents, whole.stats.tokens) == (streamed.stats.documents, streamed.stats.tokens)
    assert sorted(sum(whole.train["input_ids"], [])) == sorted(sum(streamed.train["input_ids"], []))


def test_weights_are_shares_of_tokens(tmp_path: Path, build: Build) -> None:
    few, many = text_file(tmp_path / "few.jsonl", 5, "few"), text_file(tmp_path / "many.jsonl", 500, "many")
    held = text_file(tmp_path / "e.jsonl", 5, "held")
    config = DataConfig([Source(few, weight=3), Source(many, weight=1)], [Source(held)])
    stats = build(config, train_tokens=20_000).stats
    assert stats.sources[few] / stats.tokens == pytest.approx(0.75, abs=0.01)
    # Without a number of tokens: until each source was read once.
    stats = build(config).stats
    assert stats.sources[few] / stats.tokens == pytest.approx(0.75, abs=0.01)
    assert stats.documents > 4 * 500


def test_sources_without_weights_are_pooled(tmp_path: Path, build: Build) -> None:
    paths = [text_file(tmp_path / f"{name}.jsonl", count, name) for name, count in (("a", 30), ("b", 90))]
    held = text_file(tmp_path / "e.jsonl", 5, "held")
    config = DataConfig([Source(path) for path in paths], [Source(held)])
    everything = build(config).stats
    assert (everything.documents, everything.excluded_documents) == (120, 0)
    half = build(config, train_tokens=everything.tokens // 2).stats
    assert 0.1 < half.sources[paths[0]] / half.tokens < 0.4


def test_the_seed_decides(tmp_path: Path, build: Build) -> None:
    held = text_file(tmp_path / "e.jsonl", 20, "held")
    paths = [text_file(tmp_path / f"{name}.jsonl", 40, name) for name in "ab"]
    for weight in (None, 1.0):
        config = DataConfig([Source(path, weight=weight) for path in paths], [Source(held)])
        first, again, other = (build(config, seed=seed, train_tokens=1000) for seed in (0, 0, 1))
        for part in ("train", "eval"):
            assert getattr(first, part)[:] == getattr(again, part)[:]
            assert getattr(first, part)[:] != getattr(other, part)[:]


def test_eval_is_even_over_its_sources_and_exact(tmp_path: Path, build: Build, tiny_tokenizer: Any) -> None:
    train = text_file(tmp_path / "t.jsonl", 10)
    held = [text_file(tmp_path / f"{name}.jsonl", 30, name) for name in "ab"]
    data = build(DataConfig([Source(train)], [Source(path) for path in held]), eval_tokens=400)
    assert data.stats.eval_tokens == 400
    words = tiny_tokenizer.decode(sum(data.eval["input_ids"], []))
    assert abs(words.count("a document") - words.count("b document")) <= 1


def test_mistakes_in_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken.json").write_text('[{"text": "a"},\n}')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "bad.jsonl.xz").write_bytes(b"not xz")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases = {
        "missing.jsonl": ["no such file"],
        "*.gz": ["no file matches"],
        "": ["is a folder", "*.jsonl"],
        "a.csv": ["unknown kind", ".jsonl"],
        "empty.jsonl": ["is empty"],
        "broken.jsonl": ["cannot be read (JSON parse error: Invalid value. in row 1)"],
        "broken.json": ["cannot be read"],
        "bad.jsonl.xz": ["cannot be read"],
        "bad.parquet": ["cannot be read"],
        "latin.txt": ["cannot be read"],
    }
    for name, words in cases.items():
        with pytest.raises(UserError) as error:
            open_source(Source(f"{tmp_path}/{name}"), "train")
        one_line(error, "data.train", str(tmp_path), *words)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"body": "a"}, {}, ["no column messages", "body", "text_column"]),
        ({"text": "a"}, {"text_column": "body"}, ["no column 'body'", "text"]),
        ({"prompt": "a", "txt": "b"}, {}, ["no column messages, prompt and completion, or text", "prompt, txt"]),
        ({"text": ["a"]}, {}, ["holds a list", "a column messages"]),
        ({"messages": "a"}, {}, ["must be a list"]),
        ({"messages": [{"role": "user"}]}, {}, ["needs role and content"]),
    ],
)
def test_mistakes_in_columns(tmp_path: Path, row: dict[str, Any], options: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        list(open_source(Source(write(tmp_path / "a.jsonl", [row]), **options), "eval").shuffled(0))
    one_line(error, "data.eval", *words)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_that_cannot_be_reached(streaming: bool) -> None:
    with pytest.raises(UserError) as error:
        open_source(Source("nobody/no-such-dataset", streaming=streaming), "train")
    one_line(error, "data.train nobody/no-such-dataset", "HF_HUB_OFFLINE")


def test_the_same_file_in_two_roles(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Source(text_file(tmp_path / "a.jsonl", 9))
    monkeypatch.chdir(tmp_path)
    glob = Source("./*.jsonl")
    for config, role in (
        (DataConfig([path], [glob]), "data.eval"),
        (DataConfig([glob], None, [path]), "data.calibration"),
        (DataConfig([Source(text_file(tmp_path / "b.jsonl", 2, "b"))], [path], [path]), "data.calibration"),
    ):
        with pytest.raises(UserError) as error:
            build(config)
        one_line(error, "a.jsonl is also in", role)


def test_mistakes_in_mixtures(tmp_path: Path, build: Build) -> None:
    paths = [text_file(tmp_path / f"{name}.jsonl", 9, name) for name in "abc"]
    held = [Source(paths[2])]
    cases = [
        (DataConfig([Source(paths[0], streaming=True), Source(paths[1])], held), ["give all sources a weight"]),
        (DataConfig([Source(paths[0])], held, [Source(paths[1], streaming=True)]), ["set streaming: false"]),
        (DataConfig([Source(paths[0])], eval_fraction=1e-9), ["data.eval_fraction 1e-09", "give data.eval"]),
        (DataConfig([Source(write(tmp_path / "d.jsonl", [{"text": ""}]))], held), ["zero tokens"]),
        (DataConfig([Source(paths[0])], [Source(str(tmp_path / "d.jsonl"))]), ["data.eval: no evaluation row"]),
        (DataConfig([Source(str(tmp_path / "d.jsonl"), weight=1)], held), ["no document is left"]),
    ]
    for config, words in cases:
        with pytest.raises(UserError) as error:
            build(config)
        one_line(error, "data.", *words)
