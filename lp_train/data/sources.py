"""Sources of text: local files, hub datasets and ``builtin:pydocs``, as documents in a seeded order."""

import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets

from lp_train.config import Source
from lp_train.data.files import Row, find_files, is_local, read_rows
from lp_train.data.pydocs import load_pydocs
from lp_train.errors import UserError

Role = Literal["train", "eval", "calibration"]
Rows: TypeAlias = Sequence[Row] | datasets.Dataset | datasets.IterableDataset

PYDOCS = "builtin:pydocs"
_FORMS = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "prompt", "completion": "completion"},
    {"text": "text"},
)
# ShareGPT's names, which no chat template knows.
_KEYS = {"from": "role", "value": "content"}
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


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
    def is_empty(self) -> bool:
        return not self.text and not self.messages

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

    ``identity`` names where the rows come from, so that two roles with a common row source are found out.
    ``keep`` says by a document's key whether it belongs to this view of the source.
    """

    source: Source
    label: str
    identity: frozenset[str]
    rows: Rows
    columns: dict[str, str]
    files: list[str]  # of local rows at hand: the file of each
    keep: Callable[[bytes], bool] = lambda key: True

    @property
    def streamed(self) -> bool:
        return isinstance(self.rows, datasets.IterableDataset)

    def only(self, keep: Callable[[bytes], bool]) -> "OpenSource":
        """This source without the documents whose key ``keep`` refuses."""
        return dataclasses.replace(self, keep=keep)

    def shuffled(self, seed: int) -> Iterator[Document]:
        """The documents once, in an order fixed by the seed (a streamed source: through a buffer of 1,000)."""
        if isinstance(self.rows, datasets.IterableDataset):
            for row in self.rows.shuffle(seed=seed, buffer_size=1000):
                yield from self._kept(row)
        else:
            for number in random.Random(seed).sample(range(len(self.rows)), len(self.rows)):
                yield from self.numbered(number)

    def numbered(self, number: int) -> Iterator[Document]:
        """The document of row ``number`` if it belongs to this view, else nothing."""
        return self._kept(self.rows[number], self.files[number] if self.files else "")

    def _kept(self, row: Row, file: str = "") -> Iterator[Document]:
        document = _document(row, self.columns, self.label)
        if not document.is_empty and self.keep(document.key):
            name = Path(self.source.path.removeprefix("builtin:")).name
            of_source = f"{name}:{self.source.name}" if self.source.name else name
            yield dataclasses.replace(document, path=self.source.path, domain=file.partition(".")[0] or of_source)


def open_source(source: Source, role: Role) -> OpenSource:
    """Finds the rows and the columns of a source.

    Raises:
        UserError: a path, pattern, file, hub dataset or column that is not there, or a file that cannot be read.
    """
    label = f"data.{role} {source.path}"
    try:
        identity, rows, files = _rows(source)
        first = next(iter(rows), None)
        if first is None:
            raise UserError(f"{source.path}: no rows; check the split ({source.split}) and the revision")
    except UserError as error:
        raise UserError(f"data.{role} {error}") from None
    return OpenSource(source, label, identity, rows, _find_columns(source, list(first), label), files)


def _rows(source: Source) -> tuple[frozenset[str], Rows, list[str]]:
    """Where the rows come from, the rows, and the file of each."""
    if source.path == PYDOCS:
        return frozenset([PYDOCS]), load_pydocs(), []
    if not is_local(source.path):
        return frozenset([f"{source.path}:{source.name}:{source.split}"]), _load_from_hub(source), []
    files = find_files(source.path)
    identity = frozenset(str(file.resolve()) for file in files)
    if source.streaming:
        # The list of files is read as a list of shards, which are then shuffled too.
        return identity, datasets.IterableDataset.from_generator(read_rows, gen_kwargs={"files": files}), []
    rows = [(row, file.name) for file in files for row in read_rows([file])]
    return identity, [row for row, _ in rows], [name for _, name in rows]


def _load_from_hub(source: Source) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except (OSError, ValueError, RuntimeError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE")
        state = f"HF_HUB_OFFLINE is {offline}, so only cached data sets are found" if offline else "check the network"
        reason = " ".join(str(error).split())[:200]
        wrong = f"the hub dataset did not load ({reason})"
        raise UserError(f"{source.path}: {wrong}; check name and split; {state}") from None


def _find_columns(source: Source, names: list[str], label: str) -> dict[str, str]:
    """Which column plays which part: ``{"text"|"messages"|"prompt"|"completion": column}``; options go first."""
    given = {part: getattr(source, f"{part}_column") for part in ("messages", "prompt", "completion", "text")}
    chosen = {part: column for part, column in given.items() if column}
    if "prompt" in chosen or "completion" in chosen:
        chosen = {"prompt": "prompt", "completion": "completion"} | chosen
    if not chosen:
        chosen = next((form for form in _FORMS if set(form.values()) <= set(names)), {})
    has = f"it has {', '.join(names)}"
    if not chosen:
        forms = "messages, conversations, prompt and completion, or text"
        raise UserError(f"{label}: no column {forms}; {has}; name one with text_column or messages_column")
    for part, column in chosen.items():
        if column not in names:
            raise UserError(f"{label}: no column {column!r} for the {part}; {has}")
    return chosen


def _document(row: Row, columns: dict[str, str], label: str) -> Document:
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise UserError(f"{label}: a row has no column {missing[0]!r}, only {', '.join(row)}; give all rows the same")
    parts = {part: row[column] for part, column in columns.items()}
    if "messages" in parts:
        return Document(messages=_messages(parts["messages"], label))
    if isinstance(parts.get("prompt"), list):
        prompt, completion = _messages(parts["prompt"], label), _messages(parts["completion"], label)
        return Document(messages=prompt + completion, context=len(prompt))
    for part, value in parts.items():
        if not isinstance(value, str | None):
            held = f"column {columns[part]!r} holds a {type(value).__name__}"
            raise UserError(f"{label}: {held}, not text; set messages_column for chats")
    return Document(text=parts.get("text") or parts.get("completion") or "", prompt=parts.get("prompt"))


def _messages(value: Any, label: str) -> list[dict[str, Any]]:
    """Messages with ``role`` and ``content``, from those or from ShareGPT's ``from`` and ``value``."""
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{label}: messages must be a list of {{role, content}}; a row holds {str(value)[:60]!r}")
    messages = [{_KEYS.get(key, key): part for key, part in message.items()} for message in value]
    for message in messages:
        if not {"role", "content"} <= message.keys():
            has = f"a message has {', '.join(message)}"
            raise UserError(f"{label}: {has}; it needs role and content (or from and value)")
        message["role"] = _ROLE_NAMES.get(message["role"], message["role"])
        message["content"] = message["content"] or ""
    return messages
