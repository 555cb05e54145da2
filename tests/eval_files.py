"""Small task files as the tasks of ``configs/tasks`` read them, with invented items."""

import csv
import io
import json
import lzma
import random
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

WORDS = (
    "array",
    "list",
    "parser",
    "token",
    "stream",
    "tree",
    "layer",
    "model",
    "path",
    "france",
    "paris",
    "sea",
    "story",
)


def leave_only_arc(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of lm-eval's own tasks, some ten thousand files that take half a minute to list, those of ARC alone."""
    from lm_eval.tasks import manager  # whoever only wants files need not wait for it

    shutil.copytree(Path(manager.__file__).parent / "arc", folder / "arc")
    patch.setattr(manager, "__file__", str(folder / "manager.py"))


def write_eval_files(folder: Path, items: int = 6, seed: int = 0) -> Path:
    """All files, each with ``items`` items; ``piqa`` is compressed."""
    folder.mkdir(parents=True)
    state = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(state.choice(WORDS) for _ in range(words))

    def choices(number: int, start: str = "") -> list[dict[str, Any]]:
        return [
            {
                "query": f"{start}The {text(state.randint(3, 9))}",
                "choices": [text(state.randint(1, 4)) for _ in range(number)],
                "gold": state.randrange(number),
            }
            for _ in range(items)
        ]

    files = {
        "hellaswag.jsonl": [{**row, "query": f"Sea: A {text(3)}. the {text(2)}"} for row in choices(4)],
        "arc_easy.jsonl": choices(4, "Question: "),
        "arc_challenge.jsonl": choices(4, "Question: "),
        "piqa.jsonl": choices(2),
        "openbook_qa.jsonl": choices(4),
        "winogrande.jsonl": [
            {"context_options": [f"The {text(3)}", f"The {text(3)}"], "continuation": f"is {text(2)}.", "gold": i % 2}
            for i in range(items)
        ],
        "lambada.jsonl": [{"text": f"The {text(8)}"} for _ in range(items)],
        "gsm8k.jsonl": [{"question": f"How many {text(3)}?", "answer": f"{text(3)}\n#### {i}"} for i in range(items)],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa.jsonl.xz").write_bytes(lzma.compress((folder / "piqa.jsonl").read_bytes()))
    (folder / "piqa.jsonl").unlink()
    pages = (f" = {text(2)} = \n {text(12)} , {text(5)} \n = = {text(1)} = = \n {text(6)} . \n" for _ in range(items))
    (folder / "wikitext2.test.txt").write_text("".join(pages))
    _write_blimp(folder / "blimp.tar.xz", {f"set{i}": [text(5) for _ in range(2 * items)] for i in range(2)})
    _write_mmlu(folder / "mmlu.zip", [[text(4), *(text(2) for _ in range(4)), "ABCD"[i % 4]] for i in range(items)])
    return folder


def _write_blimp(path: Path, sets: dict[str, list[str]]) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, texts in sets.items():
            rows = [
                {"sentence_good": good, "sentence_bad": bad, "UID": name}
                for good, bad in zip(texts[::2], texts[1::2], strict=True)
            ]
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            member = tarfile.TarInfo(f"blimp/data/{name}.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _write_mmlu(path: Path, rows: list[list[str]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for subject in ("anatomy", "world_religions"):
            for part in ("dev", "test"):
                stream = io.StringIO()
                csv.writer(stream).writerows([f"{subject} {part} {row[0]}", *row[1:]] for row in rows[:5])
                archive.writestr(f"data/{part}/{subject}_{part}.csv", stream.getvalue())
