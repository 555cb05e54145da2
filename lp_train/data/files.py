"""Local text files: which files a path names, and the rows in them."""

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from lp_train.errors import UserError

Row = dict[str, Any]

_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}
_UNREADABLE = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)


def is_local(path: str) -> bool:
    """Whether ``path`` means files on this machine and not a hub dataset: it exists or looks like a file name."""
    looks_local = glob.has_magic(path) or path.startswith((".", "/", "~")) or _format(Path(path)) in _READERS
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
        if _format(file) not in _READERS:
            known = ", ".join(sorted(_READERS))
            raise UserError(f"{file}: unknown kind of file; data files end in {known} (text ones also in .xz or .gz)")
    return files


def read_rows(files: list[Path]) -> Iterator[Row]:
    """The rows of the files in order. A ``.txt`` file is one row ``{"text": ...}``.

    Raises:
        UserError: a file that is empty or cannot be read; for JSON with the line's number.
    """
    for file in files:
        row = None
        try:
            for row in _READERS[_format(file)](file):
                yield row
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: cannot be read ({reason}); check or rebuild the file") from None
        if row is None:
            raise UserError(f"{file}: the file is empty; remove it from the data or fill it")


def _format(file: Path) -> str:
    """The suffix that says the format, below any compression."""
    return Path(file.stem).suffix if file.suffix in _OPENERS else file.suffix


def _open(file: Path) -> IO[str]:
    return _OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8")


def _read_text(file: Path) -> Iterator[Row]:
    with _open(file) as stream:
        text = stream.read()
    if text.strip():
        yield {"text": text}


def _read_json(file: Path) -> Iterator[Row]:
    """One object a line; a ``.json`` file may instead be one list of them."""
    with _open(file) as stream:
        lines: Iterable[str] = stream
        if _format(file) == ".json":
            text = stream.read()
            if text.lstrip().startswith("["):
                for number, value in enumerate(_parse(text, file), start=1):
                    yield _object(value, f"{file}, item {number}")
                return
            lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(_parse(line.strip(), file, number), f"{file}, line {number}")


def _parse(text: str, file: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}, line {line + error.lineno - 1}"
        raise UserError(f"{where}: not JSON ({error.msg}); every line is one JSON object") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f'{where}: a {type(value).__name__}; every row is a JSON object such as {{"text": "..."}}')
    return value


def _read_parquet(file: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1000):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
