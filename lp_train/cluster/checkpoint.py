"""Checkpoints that are whole or not there: written aside, listed, brought to disk, renamed; looked over before use."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"  # the last file of a checkpoint: size in bytes and CRC-32 of all others
SAVING = ".saving"  # in the run folder: where a checkpoint is written
_BLOCK = 1 << 24  # bytes read at once


def publish(written: Path, target: Path) -> None:
    """Lists what is in ``written``, makes sure that it is on the disk, and renames the folder to ``target``."""
    files = [path for path in sorted(written.rglob("*")) if path.is_file() and path.name != MANIFEST]
    listed = {str(path.relative_to(written)): _state(path) for path in files}
    (written / MANIFEST).write_text(json.dumps(listed))
    for path in (*written.rglob("*"), written):
        _to_disk(path)
    if target.exists():  # a damaged one of the same step
        shutil.rmtree(target)
    written.rename(target)
    _to_disk(target.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when all its files are those that were written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        wrong = [name for name, state in listed.items() if _state(folder / name) != state]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be read ({error})"
    return f"{wrong[0]} is damaged" if wrong else None


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run folder that is whole; each newer one is named with what is wrong with it."""
    found = (path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (wrong := damage(path)) is None:
            return path
        say(f"{path.name} is left out: {wrong}")
    return None


def is_disk_error(error: Exception) -> bool:
    """Whether writing failed for want of room or rights, as the system, safetensors and torch tell it."""
    of_torch = isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|iostream error", str(error))
    return isinstance(error, OSError | SafetensorError) or of_torch is not None


def _state(path: Path) -> list[int]:
    """[bytes, CRC-32]."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
