"""Local files of the tasks in this folder: read, checked, and handed to lm-eval as a dataset of one split.

lm-eval calls :func:`read` (``custom_dataset`` in the task's YAML) with the YAML's ``dataset_kwargs`` and with
``task_data``, the folder with the files. A file may be there as it is or compressed (``.xz``, ``.gz``).
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from lp_train.data.sources import Row, load_files
from lp_train.errors import UserError

COMPRESSED = ("", ".xz", ".gz")
LETTERS = "ABCD"


def read(
    task_data: str | None = None, file: str = "", kind: str = "", items: int | None = None, **unused: Any
) -> dict[str, Dataset]:
    """``{"test": Dataset}`` of the rows in ``task_data/file``; with ``items``, that many of them, always the same.

    ``kind`` says what a row holds: a key of ``KINDS``.

    Raises:
        UserError: no folder given, file missing, empty or unreadable, wrong columns, a label out of range.
    """
    if task_data is None:
        raise UserError(f"evaluate.task_data null: the folder with {file}; set it, or name a task of the hub")
    path = _find(Path(task_data).expanduser(), file)
    read_kind, columns = KINDS[kind]
    try:
        rows = list(read_kind(path))
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); it must be as published") from None
    if not rows:
        raise UserError(f"{path}: no item in it; give the file as published")
    for number, row in enumerate(rows, start=1):
        _check(row, columns, f"{path}, item {number}")
    if items is not None and items < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), items))]
    return {"test": Dataset.from_list(rows)}


def _find(folder: Path, file: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"evaluate.task_data {str(folder)!r}: no such folder; give the one with the tasks' files")
    for suffix in COMPRESSED:
        if (folder / f"{file}{suffix}").is_file():
            return folder / f"{file}{suffix}"
    raise UserError(f"evaluate.task_data {str(folder)!r}: no {file} in it; add the file or leave the task out")


def _check(row: Row, columns: dict[str, type], where: str) -> None:
    """Columns and their types; ``gold``, where there is one, is an index of the row's only list."""
    for name, expected in columns.items():
        if not isinstance(row.get(name), expected) or isinstance(row[name], bool):
            given = type(row[name]).__name__ if name in row else "nothing"
            raise UserError(f"{where}: {name} holds {given}, not {expected.__name__}; columns are {', '.join(columns)}")
        if expected is list and (len(row[name]) < 2 or not all(isinstance(text, str) and text for text in row[name])):
            raise UserError(f"{where}: {name} is not a list of two or more texts; correct or remove the item")
    if "gold" in columns:
        choices = len(next(row[name] for name, expected in columns.items() if expected is list))
        if not 0 <= row["gold"] < choices:
            raise UserError(f"{where}: gold {row['gold']} is out of range; there are {choices} choices, from 0")


# --- files that are no JSON lines ------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[Row]:
    yield from load_files([path])


def _hellaswag(path: Path) -> Iterator[Row]:
    """An unfinished last sentence gets a capital, as lm-eval's own task joins the two parts of a context."""
    for row in load_files([path]):
        if isinstance(query := row.get("query"), str):
            unfinished = r"([.!?:]\s+)([^.!?]*[^.!?\s])$"
            row["query"] = re.sub(unfinished, lambda match: match[1] + match[2].capitalize(), query)
        yield row


def _pages(path: Path) -> Iterator[Row]:
    """The articles of a WikiText file: each starts with its title between single equals signs."""
    (row,) = load_files([path])
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=].*[^=] = $", row["text"])]
    for start, end in zip(starts, [*starts[1:], len(row["text"])], strict=False):
        yield {"page": row["text"][start:end]}


def _blimp(path: Path) -> Iterator[Row]:
    """BLiMP's archive: 67 files of 1,000 pairs."""
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".jsonl")), key=lambda m: m.name)
        for member in members:
            stream = archive.extractfile(member)
            assert stream is not None
            for line in stream.read().decode().splitlines():
                row = json.loads(line)
                yield {name: row.get(name) for name in ("sentence_good", "sentence_bad", "UID")}


def _mmlu(path: Path) -> Iterator[Row]:
    """MMLU's archive: all subjects' test items, each with the development items of its subject."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if re.search(r"test/\w+_test\.csv$", name))
        for name in names:
            subject = Path(name).name.removesuffix("_test.csv")
            dev = _mmlu_items(archive, f"{name.rpartition('test/')[0]}dev/{subject}_dev.csv")
            for item in _mmlu_items(archive, name):
                yield {**item, "subject": subject.replace("_", " "), "examples": dev}


def _mmlu_items(archive: zipfile.ZipFile, name: str) -> list[Row]:
    try:
        lines = list(csv.reader(io.StringIO(archive.read(name).decode("utf-8"))))
    except KeyError:
        raise UserError(f"{archive.filename}: no {name} in it; give the archive as published") from None
    for number, line in enumerate(lines, start=1):
        if len(line) != 6 or line[5] not in LETTERS:
            raise UserError(f"{archive.filename}, {name}, item {number}: not a question, four choices and a letter A-D")
    return [{"question": q, "choices": choices, "gold": LETTERS.index(letter)} for q, *choices, letter in lines]


KINDS: dict[str, tuple[Callable[[Path], Iterator[Row]], dict[str, type]]] = {
    "choices": (_json_lines, {"query": str, "choices": list, "gold": int}),
    "hellaswag": (_hellaswag, {"query": str, "choices": list, "gold": int}),
    "contexts": (_json_lines, {"context_options": list, "continuation": str, "gold": int}),
    "text": (_json_lines, {"text": str}),
    "answer": (_json_lines, {"question": str, "answer": str}),
    "pages": (_pages, {"page": str}),
    "blimp": (_blimp, {"sentence_good": str, "sentence_bad": str, "UID": str}),
    "mmlu": (_mmlu, {"question": str, "choices": list, "gold": int, "subject": str}),
}


class SubjectExamples(ContextSampler):
    """MMLU's few-shot examples: the first development items of the evaluated item's own subject."""

    source = "development items of the item's subject"  # for the report

    def sample(
        self, n: int, eval_doc: Row | None = None, df: Sequence[Row] | None = None, **unused: Any
    ) -> Sequence[Row]:
        assert eval_doc is not None
        examples = eval_doc["examples"]
        if n > len(examples):
            raise UserError(f"evaluate.num_fewshot {n}: MMLU has {len(examples)} examples for each subject")
        return examples[:n]
