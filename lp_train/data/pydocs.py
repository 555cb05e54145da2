"""``builtin:pydocs``: technical English that is on every machine, from docstrings of installed Python code.

Sources are read with :mod:`ast` and never imported: the standard library, then numpy, torch and transformers,
until enough text is there. Kept are paragraphs of English prose only (no doctests, parameter tables, code), each
once. A document is one class, or one module without its large classes, in source order. The same versions of
Python and the packages give the same documents in the same order.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tqdm import tqdm

Part = Literal["train", "eval", "calibration"]

PACKAGES = ("numpy", "torch", "transformers")
# About 450,000 tokens, several times what a demonstration trains on, in a few seconds; reading on through all of
# torch and transformers would take half a minute for more of the same kind of text.
ENOUGH_CHARACTERS = 2_000_000
# Parsing is most of the time: leave out files with fewer docstrings than about one in twice this many characters.
_CHARACTERS_PER_QUOTES = 1500
PER_CENT = {"eval": 4, "calibration": 2}  # the rest is for training

_MIN_CLASS_CHARACTERS = 600  # a class with less prose is told in its module's document
_MIN_DOCUMENT_CHARACTERS = 300
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "models",
    "__pycache__",
}
# "Notes\n-----" and the like.
_UNDERLINED_HEADING = re.compile(r"^[ \t]*\S[^\n]*\n[ \t]*[-=~^]{3,}[ \t]*$", re.MULTILINE)
_FORMAT_VERSION = 1  # part of the cache's name: raise it when the rules below change

_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def cache_folder() -> Path:
    """The program's cache folder: ``$LP_TRAIN_CACHE``, else ``~/.cache/lp_train``. It need not exist yet."""
    return Path(os.environ.get("LP_TRAIN_CACHE") or "~/.cache/lp_train").expanduser()


def load_pydocs(part: Part, folder: Path | None = None) -> list[dict[str, str]]:
    """Documents of one part as ``{"name": qualified name, "text": paragraphs}``, in a fixed order.

    The parts are disjoint: by hash of the qualified name (94 % train, 4 % eval, 2 % calibration), and no paragraph
    stands in two documents. All parts are written to ``folder`` (default :func:`cache_folder`) at the first use.
    """
    path = (folder or cache_folder()) / f"pydocs-{_versions_hash()}.jsonl"
    if not path.exists():
        _write_atomically(path, "".join(json.dumps(document) + "\n" for document in _collect()))
    with path.open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    return [document for document in documents if part_of(document["name"]) == part]


def part_of(name: str) -> Part:
    """The part that the document of this qualified name belongs to, the same on every machine."""
    bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % 100
    if bucket < PER_CENT["eval"]:
        return "eval"
    return "calibration" if bucket < PER_CENT["eval"] + PER_CENT["calibration"] else "train"


def prose_paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs of English prose in a docstring, each on one line with single spaces."""
    after_code_sign = False
    text = _UNDERLINED_HEADING.sub("", inspect.cleandoc(docstring))
    for block in re.split(r"\n[ \t]*\n", text):
        # reStructuredText: an indented block after a paragraph that ends in "::" is code.
        is_code = after_code_sign and block.startswith(" ")
        after_code_sign = is_code or block.rstrip().endswith("::")
        if is_code or "```" in block or ">>>" in block:
            continue
        for item in re.split(r"\n(?=[ \t]*(?:[-*+•]|\d+[.)])[ \t])", block):
            paragraph = " ".join(item.split())
            if _is_prose(paragraph, item):
                yield paragraph.replace("``", "`")


def _is_prose(paragraph: str, lines: str) -> bool:
    """Whether it is a sentence or more: words, few signs of code, no parameter table."""
    if len(paragraph) < 60 or not re.match(r"[-*+•]? ?[A-Z\"'`(]", paragraph) or paragraph[-1] not in ".!?:\"')":
        return False
    parameter_lines = re.findall(r"^[ \t]*[*`]*\w+[`]*[ \t]*(?:\([^)\n]*\))?[ \t]*:(?!:)", lines, re.MULTILINE)
    if len(parameter_lines) > 1 or re.match(r"(?:[-*:@.]\S|[-*+] [`*]|\w+ ?\(.*?\) ?:|`?\w+`? ?:)", paragraph):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    signs = sum(character in "=(){}[]<>_\\|/*#+@$%^~&" for character in paragraph)
    return letters >= 0.82 * len(paragraph) and signs <= 0.06 * len(paragraph)


def module_documents(source: str, module: str) -> Iterator[tuple[str, list[str]]]:
    """``(qualified name, paragraphs)`` of the module and of its larger classes; nothing if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return
    own: list[str] = []
    for node in [tree, *_definitions(tree)]:
        paragraphs = [p for d in _docstrings(node, deep=node is not tree) for p in prose_paragraphs(d)]
        if isinstance(node, ast.ClassDef) and sum(map(len, paragraphs)) >= _MIN_CLASS_CHARACTERS:
            yield f"{module}.{node.name}", paragraphs
        else:
            own += paragraphs
    yield module, own


def _definitions(node: ast.AST) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)]


def _docstrings(node: _Definition, deep: bool) -> Iterator[str]:
    """Of the node itself and, when ``deep``, of all classes and methods in it (not of functions in functions)."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield docstring
    if deep and isinstance(node, ast.ClassDef):
        for child in _definitions(node):
            yield from _docstrings(child, deep=True)


def _source_files() -> Iterator[tuple[str, Path]]:
    """``(dotted module name, file)`` of everything that may be read, in a fixed order."""
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for name in PACKAGES:
        try:
            roots.append((name, Path(str(importlib.metadata.distribution(name).locate_file(name)))))
        except importlib.metadata.PackageNotFoundError:
            continue
    for prefix, root in roots:
        for folder, folders, files in os.walk(root):
            # In place: os.walk then neither enters them nor depends on the order of the file system. Private
            # packages come last: the public ones are the better documented.
            folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS, key=lambda f: (f.startswith("_"), f))
            packages = [part for part in (prefix, *Path(folder).relative_to(root).parts) if part]
            for file in sorted(f for f in files if f.endswith(".py") and not f.startswith("test_")):
                stem = file.removesuffix(".py")
                yield ".".join(packages + [stem] * (stem != "__init__")), Path(folder, file)


def _collect() -> Iterator[dict[str, str]]:
    """All documents, until there is enough text; every paragraph only where it stands first."""
    seen: set[str] = set()
    characters = 0
    bar = tqdm(total=ENOUGH_CHARACTERS, desc="reading docstrings", unit="B", unit_scale=True, delay=2, leave=False)
    with bar:
        for module, file in _source_files():
            source = file.read_text("utf-8", "replace")
            if source.count('"""') * _CHARACTERS_PER_QUOTES < len(source):
                continue
            for name, paragraphs in module_documents(source, module):
                text = "\n\n".join(p for p in dict.fromkeys(paragraphs) if p not in seen)
                seen.update(paragraphs)
                if len(text) >= _MIN_DOCUMENT_CHARACTERS:
                    yield {"name": name, "text": text}
                    characters += len(text)
                    bar.update(len(text))
            if characters >= ENOUGH_CHARACTERS:
                return


def _versions_hash() -> str:
    """A short name for the versions that the text depends on."""
    versions = [f"format {_FORMAT_VERSION}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return hashlib.blake2b("\n".join(versions).encode(), digest_size=6).hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    """Several processes may do this at once: each renames its own complete file, and the last one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
