"""``builtin:pydocs``: prose and nothing else, each paragraph once, the same twice."""

from collections.abc import Iterator
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


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two source files of twenty docstrings, half of them in both; the second one cannot be imported."""
    for name, first in (("one", 0), ("two", 10)):
        functions = (f"def f{n}():\n    '''{SENTENCE} {OTHER}'''\n".replace("'''", '"""') for n in range(20))
        told = "\n".join(f.replace("whole line", f"line of {first + n}") for n, f in enumerate(functions))
        (tmp_path / f"{name}.py").write_text(told + "raise RuntimeError\n")
    monkeypatch.setattr(pydocs, "_source_files", lambda: sorted(tmp_path.glob("*.py")))
    pydocs.load_pydocs.cache_clear()
    yield
    pydocs.load_pydocs.cache_clear()


def test_every_paragraph_stands_once_and_documents_are_of_one_size(files: None) -> None:
    documents = [row["text"] for row in pydocs.load_pydocs()]
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) == 30
    assert all("'''" not in p and p.endswith(OTHER) for p in paragraphs)
    assert max(map(len, documents)) < pydocs.DOCUMENT_CHARACTERS + 300


def test_reading_stops_when_there_is_enough(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs, "ENOUGH_CHARACTERS", 100)
    assert sum(row["text"].count("line of") for row in pydocs.load_pydocs()) == 20


@pytest.mark.slow
def test_the_same_documents_twice() -> None:
    """The real thing: the standard library and the installed packages."""
    pydocs.load_pydocs.cache_clear()
    documents = pydocs.load_pydocs()
    pydocs.load_pydocs.cache_clear()
    assert pydocs.load_pydocs() == documents
    assert sum(len(row["text"]) for row in documents) > 750_000
