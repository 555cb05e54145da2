"""``builtin:pydocs``: technical English that is on every machine, from docstrings of installed Python code.

Source files are read as text and never imported: the standard library, then numpy and torch, until enough is there.
Kept are paragraphs of English prose (no code, no parameter tables), each once. The same versions of Python and of the
packages give the same documents in the same order.
"""

import functools
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ENOUGH_CHARACTERS = 1_000_000  # 230,000 tokens, several times what a demonstration trains on, in a few seconds
DOCUMENT_CHARACTERS = 2_000  # neighbouring paragraphs of one file together
PACKAGES = ("numpy", "torch")

_SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
# An empty line, the line under a heading, or the start of a list's item.
_BETWEEN_PARAGRAPHS = re.compile(r"\n[ \t]*(?:[-=~^]{3,}[ \t]*)?\n|\n(?=[ \t]*(?:[-*+•]|\d+[.)])[ \t])")
# A sentence or more that starts with a capital; not "Name: what it is", the form of parameters.
_SENTENCE = re.compile(r"(?:[-*+•] |\d+[.)] )?[A-Z][\w'-]* (?![^ ]*:)[\w'\"`(*]\S* .*[.!?:]")


@functools.cache
def load_pydocs() -> list[dict[str, str]]:
    """All documents as ``{"text": paragraphs}``, in a fixed order."""
    documents, characters = [], 0
    seen: set[str] = set()
    for file in _source_files():
        for text in _documents(file.read_text("utf-8", "replace"), seen):
            documents.append({"text": text})
            characters += len(text)
        if characters >= ENOUGH_CHARACTERS:
            break
    return documents


def _source_files() -> Iterator[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    roots += [Path(str(importlib.metadata.distribution(name).locate_file(name))) for name in PACKAGES]
    for root in roots:
        files = [(file.relative_to(root).parts, file) for file in root.rglob("*.py")]
        # Private modules come last: the public ones are the better documented.
        files.sort(key=lambda named: [(part.startswith("_"), part) for part in named[0]])
        yield from (file for parts, file in files if not _SKIPPED & set(parts) and not parts[-1].startswith("test_"))


def _documents(source: str, seen: set[str]) -> Iterator[str]:
    """The new prose of one file in pieces of about ``DOCUMENT_CHARACTERS``; ``seen`` is added to."""
    text = ""
    for docstring in _DOCSTRING.findall(source):
        for paragraph in prose_paragraphs(docstring):
            if paragraph not in seen:
                seen.add(paragraph)
                text += f"\n\n{paragraph}" if text else paragraph
        if len(text) >= DOCUMENT_CHARACTERS:
            yield text
            text = ""
    if text:
        yield text


def prose_paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of English prose in a docstring, each on one line with single spaces."""
    for block in _BETWEEN_PARAGRAPHS.split(docstring):
        paragraph = " ".join(block.split())
        letters = len(re.sub(r"[^A-Za-z ]+", "", paragraph))
        if len(paragraph) >= 60 and letters >= 0.88 * len(paragraph) and _SENTENCE.fullmatch(paragraph):
            yield paragraph.replace("``", "`")
