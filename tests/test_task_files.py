"""Task files and names that are wrong: one line each, with value, rule and remedy."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from eval_files import leave_only_arc, write_eval_files

from lp_train.config import EvaluateConfig
from lp_train.errors import UserError
from lp_train.evaluation.tasks import load_suite


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eval_files(tmp_path_factory.mktemp("eval") / "files")


def change(files: Path, name: str, row: dict[str, Any] | None) -> None:
    path = files / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("" if row is None else "".join(json.dumps(r) + "\n" for r in [rows[0], {**rows[1], **row}]))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc_easy_local", {"gold": 4}, "arc_easy.jsonl, item 2: gold 4 is out of range; there are 4 choices"),
        ("arc_easy_local", {"gold": -1}, "gold -1 is out of range"),
        ("arc_easy_local", {"gold": "A"}, "item 2: gold holds str, not int"),
        ("arc_easy_local", {"query": None}, "query holds NoneType, not str; columns are query, choices, gold"),
        ("arc_easy_local", {"choices": ["one"]}, "choices is not a list of two or more texts"),
        ("winogrande_local", {"gold": 2}, "gold 2 is out of range; there are 2 choices"),
        ("hellaswag_local", {"query": 3}, "query holds int, not str"),
        ("lambada_local", None, "lambada.jsonl: the file is empty"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, task: str, row: dict[str, Any] | None, message: str) -> None:
    files = write_eval_files(tmp_path / "files")
    change(files, f"{task.removesuffix('_local')}.jsonl", row)
    refused(files, message, task)


def refused(files: Path | None, message: str, *tasks: str, **options: Any) -> None:
    with pytest.raises(UserError) as error:
        load_suite(EvaluateConfig(tasks=list(tasks), task_data=files and str(files), **options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    files = write_eval_files(tmp_path / "files")
    refused(None, "evaluate.task_data null: the folder with piqa.jsonl", "piqa_local")
    refused(tmp_path / "none", "no such folder", "piqa_local")
    (files / "piqa.jsonl.xz").unlink()
    refused(files, "no piqa.jsonl in it; add the file or leave the task out", "piqa_local")
    (files / "blimp.tar.xz").write_bytes(b"no archive")
    refused(files, "blimp.tar.xz: cannot be read", "blimp_local")
    with zipfile.ZipFile(files / "mmlu.zip", "w") as archive:
        archive.writestr("data/test/anatomy_test.csv", "question,a,b,c,d,E\n")
    refused(files, "no data/dev/anatomy_dev.csv in it", "mmlu_local")
    with zipfile.ZipFile(files / "mmlu.zip", "a") as archive:
        archive.writestr("data/dev/anatomy_dev.csv", "question,a,b,c,d,A\n")
    refused(files, "item 1: not a question, four choices and a letter A-D", "mmlu_local")
    (files / "wikitext2.test.txt").write_text("no article\n")
    refused(files, "wikitext2.test.txt: no item in it", "wikitext_local")


def test_unknown_names(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_only_arc(monkeypatch, tmp_path)
    refused(files, "'arc_easi': no such task, group or file; did you mean arc_easy", "arc_easi")
    refused(files, "evaluate.tasks arc_easy: cannot be loaded (", "arc_easy")  # one of lm-eval's own, from the hub
    refused(files, "evaluate.tasks 'hellaswag_locl': no such task, group or file; did you mean hella", "hellaswag_locl")


def test_names_twice_and_too_many_examples(files: Path) -> None:
    refused(files, "name each task once", "seven", "piqa_local")
    refused(files, "task piqa_local has 6 items to take examples from", "piqa_local", num_fewshot=6)
    refused(files, "evaluate.num_fewshot 6: MMLU has 5 examples", "mmlu_local", num_fewshot=6)
