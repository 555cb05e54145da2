"""Sources of text: local files, hub datasets and ``builtin:pydocs``, as documents in a seeded order."""

import dataclasses
import glob
import hashlib
import logging
import lzma
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from lp_train.config import Source
from lp_train.data.pydocs import load_pydocs
from lp_train.errors import UserError, one_line

Role = Literal["train", "eval", "calibration"]
Row = dict[str, Any]

PYDOCS = "builtin:pydocs"
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}  # of the library datasets
COMPRESSED = (".xz", ".gz")
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, StopIteration, lzma.LZMAError, zlib.error)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what is wrong with a file is said below
_FORMS = ({"messages": "messages"}, {"prompt": "prompt", "completion": "completion"}, {"text": "text"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, in one of three forms.

    Plain text: ``text``. Prompt and completion: ``prompt`` and ``text``, the completion. Chat: ``messages`` (``role``
    and ``content`` each), of which the first ``context`` are a prompt and never trained. ``path`` is its source's;
    ``domain`` says what kind of text it is: its file's name up to the first dot, or the data set's name.
    """

    text: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    context: int = 0
    path: str = dataclasses.field(default="", compare=False)
    domain: str = dataclasses.field(default="", compare=False)

    @property
    def size(self) -> int:
        """Roughly its number of characters."""
        return len(self.text) + len(self.prompt or "") + sum(len(str(m.get("content"))) for m in self.messages)

    @property
    def key(self) -> bytes:
        """Hash of the text whose runs of whitespace are one space: equal for texts that count as the same."""
        contents = [str(message.get("content") or "") for message in self.messages]
        words = " ".join([self.prompt or "", self.text, *contents]).split()
        return hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class OpenSource:
    """A source with its rows at hand, or with the means to stream them.

    ``tables`` holds the rows of each local file, else all of them, with their domain. ``identity`` names where they
    come from, so that two roles with a common row source are found out. ``keep`` says by a document's key whether it
    belongs to this view of the source.
    """

    source: Source
    label: str
    identity: frozenset[str]
    tables: list[tuple[str, datasets.Dataset]]
    keep: Callable[[bytes], bool] = lambda key: True

    @property
    def streamed(self) -> bool:
        return isinstance(self.tables[0][1], datasets.IterableDataset)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.tables)

    def shuffled(self, seed: int) -> Iterator[Document]:
        """The documents once, in an order fixed by the seed (a streamed source: through a buffer of 1,000)."""
        if self.streamed:
            ((domain, rows),) = self.tables
            for row in rows.shuffle(seed=seed, buffer_size=1000):
                yield from self._kept(row, domain)
        else:
            for number in random.Random(seed).sample(range(len(self)), len(self)):
                yield from self.numbered(number)

    def numbered(self, number: int) -> Iterator[Document]:
        """The document of row ``number`` if it belongs to this view, else nothing."""
        ends = np.cumsum([len(rows) for _, rows in self.tables])
        place = int(np.searchsorted(ends, number, side="right"))
        domain, rows = self.tables[place]
        return self._kept(rows[int(number - ends[place])], domain)  # from the table's end

    def _kept(self, row: Row, domain: str) -> Iterator[Document]:
        document = _document(row, _forms(self.source), self.label)
        if (document.text or document.messages) and self.keep(document.key):
            yield dataclasses.replace(document, path=self.source.path, domain=domain)


def open_source(source: Source, role: Role) -> OpenSource:
    """Finds the rows and the columns of a source.

    Raises:
        UserError: a path, pattern, file, hub dataset or column that is not there, or a file that cannot be read.
    """
    label = f"data.{role} {source.path}"
    try:
        identity, tables = _tables(source)
    except UserError as error:
        raise UserError(f"data.{role} {error}") from None
    for _, rows in tables:
        names = list(next(iter(rows)))
        if not any(set(form.values()) <= set(names) for form in _forms(source)):
            wanted = repr(source.text_column) if source.text_column else "messages, prompt and completion, or text"
            has = f"it has {', '.join(names)}"
            raise UserError(f"{label}: no column {wanted}; {has}; name the one with the text in text_column")
    return OpenSource(source, label, identity, tables)


def _forms(source: Source) -> Sequence[dict[str, str]]:
    """Which column plays which part; a row is of the first form that it has values for."""
    return [{"text": source.text_column}] if source.text_column else _FORMS


def _tables(source: Source) -> tuple[frozenset[str], list[tuple[str, datasets.Dataset]]]:
    """Where the rows come from, and the rows by domain."""
    name = Path(source.path.removeprefix("builtin:")).name
    if source.path == PYDOCS:
        return frozenset([PYDOCS]), [(name, datasets.Dataset.from_list(load_pydocs()))]
    if not is_local(source.path):
        identity = frozenset([f"{source.path}:{source.name}:{source.split}"])
        return identity, [(f"{name}:{source.name}" if source.name else name, _load_from_hub(source))]
    files = find_files(source.path)
    if source.streaming:  # several files are shards, which are shuffled too
        tables = [(name, load_files(files, streaming=True))]
    else:
        tables = [(file.name.partition(".")[0], load_files([file])) for file in files]
    return frozenset(str(file.resolve()) for file in files), tables


def is_local(path: str) -> bool:
    """Whether ``path`` means files on this machine and not a hub dataset: it exists or looks like a file name."""
    looks_local = glob.has_magic(path) or path.startswith((".", "/", "~")) or _suffix(Path(path)) in READERS
    return looks_local or Path(path).expanduser().exists()


def find_files(path: str) -> list[Path]:
    """The files that a path or a glob (``**`` for any depth) names, sorted.

    Raises:
        UserError: nothing there, a folder, or a kind of file that cannot be read.
    """
    expanded = str(Path(path).expanduser())
    if Path(expanded).is_dir():
        raise UserError(f"{path}: this is a folder; name its files with a pattern such as {path.rstrip('/')}/*.jsonl")
    files = sorted(Path(name) for name in glob.glob(expanded, recursive=True) if Path(name).is_file())
    if not files and glob.has_magic(expanded):
        raise UserError(f"{path}: no file matches this pattern; check it from the folder {Path.cwd()}")
    if not files:
        raise UserError(f"{path}: no such file; relative paths start at {Path.cwd()}")
    for file in files:
        if _suffix(file) not in READERS:
            known = ", ".join(sorted(READERS))
            raise UserError(f"{file}: unknown kind of file; data files end in {known} (text ones also in .xz or .gz)")
    return files


def _suffix(file: Path) -> str:
    """The suffix that says the format, below any compression."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def load_files(files: list[Path], streaming: bool = False) -> datasets.Dataset:
    """Their rows; a ``.txt`` file is one row ``{"text": ...}``."""
    reader = READERS[_suffix(files[0])]
    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        names = [str(file) for file in files]
        rows = datasets.load_dataset(reader, data_files=names, split="train", streaming=streaming, **options)
        if next(iter(rows), None) is None:
            raise ValueError("no data")
        return rows
    except (*_UNREADABLE, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if isinstance(error, StopIteration) or "no data" in reason:
            raise UserError(f"{files[0]}: the file is empty; remove it from the data or fill it") from None
        raise UserError(f"{files[0]}: cannot be read ({reason}); check or rebuild the file") from None


def _load_from_hub(source: Source) -> datasets.Dataset | datasets.IterableDataset:
    try:
        rows = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE")
        state = f"HF_HUB_OFFLINE is {offline}, so only cached data sets are found" if offline else "check the network"
        reason = one_line(error)[:200]
        wrong = f"the hub dataset did not load ({reason})"
        raise UserError(f"{source.path}: {wrong}; check name and split; {state}") from None
    if next(iter(rows), None) is None:
        raise UserError(f"{source.path}: no rows; check the split ({source.split}) and the revision")
    return rows


def _document(row: Row, forms: Sequence[dict[str, str]], label: str) -> Document:
    """Empty where the row has a value for none of the forms."""
    form = next((form for form in forms if all(row.get(column) is not None for column in form.values())), {})
    parts = {part: row[column] for part, column in form.items()}
    if "messages" in parts:
        return Document(messages=_messages(parts["messages"], label))
    if isinstance(parts.get("prompt"), list):
        prompt, completion = _messages(parts["prompt"], label), _messages(parts["completion"], label)
        return Document(messages=prompt + completion, context=len(prompt))
    for part, value in parts.items():
        if not isinstance(value, str):
            held = f"column {form[part]!r} holds a {type(value).__name__}"
            raise UserError(f"{label}: {held}, not text; chats stand in a column messages")
    return Document(text=parts.get("text") or parts.get("completion") or "", prompt=parts.get("prompt"))


def _messages(value: Any, label: str) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{label}: messages must be a list of {{role, content}}; a row holds {str(value)[:60]!r}")
    for message in value:
        if not {"role", "content"} <= message.keys():
            raise UserError(f"{label}: a message has {', '.join(message)}; it needs role and content")
    return [{**message, "content": message["content"] or ""} for message in value]
