"""``builtin:pydocs``: prose and nothing else, each paragraph once, three disjoint parts, written once."""

import json
import sysconfig
from pathlib import Path

import pytest

from lp_train.data import pydocs

SENTENCE = "The reader returns as soon as a whole line has come in, or when the stream has ended."
OTHER = "Nothing is kept between two calls, so that several threads may use the same object at once."


@pytest.mark.parametrize(
    "docstring",
    [
        ">>> f(1)\n    2\n    and so on, for as long as the list is not empty, says the doctest.",
        "Parameters\n----------\nx : int\n    How many of them there are.\ny : float, optional\n    How large.",
        "Args:\n    hidden_states (`torch.Tensor`): Input to the layer.\n    cache (`bool`): Whether to keep.",
        "```python\nThe_result = some(call, of, a_function)\n```",
        "Example::\n\n    Model = Net(input_size, hidden_size)  # A comment that looks like a sentence.",
        ":param limit: The largest number of lines that is read before the function gives up.",
        "x = f(y[0], {k: v}) + g(z) / (a_b * c_d) if a[1] else {**b, 'c': (1, 2, 3)} # all of it.",
        "Too short.",
        "== table ====  ========\nColumn one     column two",
    ],
)
def test_what_is_not_prose_is_left_out(docstring: str) -> None:
    assert list(pydocs.prose_paragraphs(docstring)) == []


def test_prose_is_kept_and_put_on_one_line() -> None:
    docstring = f"""{SENTENCE[:40]}
    {SENTENCE[40:].strip()}

    Notes
    -----
    {OTHER}

      * A list's item counts as a paragraph of its own, when it is long enough to be a sentence.
      * And so does the second item of this list, which follows in the next line of the docstring.
    """
    kept = list(pydocs.prose_paragraphs(docstring))
    assert [paragraph[:20] for paragraph in kept] == [
        SENTENCE[:20],
        OTHER[:20],
        "* A list's item coun",
        "* And so does the se",
    ]
    assert all("\n" not in paragraph and "  " not in paragraph for paragraph in kept)


def test_documents_of_a_module() -> None:
    large = "\n".join(f"    def m{n}(self):\n        '''{OTHER} Case {n}.'''\n" for n in range(8))
    source = (
        f"'''{SENTENCE} Module.'''\n"
        f"class Large:\n    '''{SENTENCE} Class.'''\n{large}\n"
        f"class Small:\n    '''{SENTENCE} Small.'''\n"
        f"def function():\n    '''{SENTENCE} Function.'''\n    def inner():\n        '''{SENTENCE} Inner.'''\n"
    )
    documents = dict(pydocs.module_documents(source, "package.module"))
    assert list(documents) == ["package.module.Large", "package.module"]
    assert documents["package.module"] == [f"{SENTENCE} {word}." for word in ("Module", "Small", "Function")]
    assert documents["package.module.Large"][0] == f"{SENTENCE} Class."
    assert len(documents["package.module.Large"]) == 9
    assert list(pydocs.module_documents("def broken(:", "m")) == []


def test_parts_by_name() -> None:
    parts = [pydocs.part_of(f"module{n}.Class") for n in range(5000)]
    assert 0.03 < parts.count("eval") / 5000 < 0.05
    assert 0.01 < parts.count("calibration") / 5000 < 0.03
    # Pinned: another hash would move documents between training and evaluation of older runs.
    assert [pydocs.part_of(name) for name in ("argparse", "copy", "m12")] == ["train", "eval", "calibration"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two modules of the standard library, as the cache keeps them."""
    folder = tmp_path_factory.mktemp("cache")
    files = [(name, Path(sysconfig.get_path("stdlib"), f"{name}.py")) for name in ("argparse", "functools", "typing")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydocs, "_source_files", lambda: iter(files))
        pydocs.load_pydocs("train", folder)
    return folder


def test_the_cache_is_written_once_and_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = folder.iterdir()  # no temporary file is left
    assert file.suffix == ".jsonl"
    monkeypatch.setattr(pydocs, "_collect", lambda: pytest.fail("collected again"))
    parts = [pydocs.load_pydocs(part, folder) for part in ("train", "eval", "calibration")]
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(map(len, parts)) == len(written) > 3
    assert {document["name"] for part in parts for document in part} == {document["name"] for document in written}


def test_paragraphs_stand_once(folder: Path) -> None:
    (file,) = folder.iterdir()
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    paragraphs = [paragraph for document in documents for paragraph in document["text"].split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 50


def test_other_versions_have_another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    name = pydocs._versions_hash()
    monkeypatch.setattr(pydocs.platform, "python_version", lambda: "3.99.0")
    assert pydocs._versions_hash() != name


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LP_TRAIN_CACHE", str(tmp_path))
    assert pydocs.cache_folder() == tmp_path
    monkeypatch.delenv("LP_TRAIN_CACHE")
    assert pydocs.cache_folder() == Path.home() / ".cache" / "lp_train"


@pytest.mark.slow
def test_the_same_documents_twice_and_none_in_two_parts(tmp_path: Path) -> None:
    """The real thing: the standard library and the installed packages."""
    parts = {part: pydocs.load_pydocs(part, tmp_path / "a") for part in ("train", "eval", "calibration")}
    assert parts["train"] == pydocs.load_pydocs("train", tmp_path / "b")
    paragraphs = {part: {p for d in found for p in d["text"].split("\n\n")} for part, found in parts.items()}
    assert not paragraphs["train"] & paragraphs["eval"]
    assert not paragraphs["train"] & paragraphs["calibration"]
    assert sum(len(d["text"]) for d in parts["train"]) > 1_500_000
    assert sum(len(d["text"]) for d in parts["eval"]) > 40_000
