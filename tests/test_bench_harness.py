"""``scripts/bench.py harness`` on a tiny model: it counts what it says it counts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from eval_files import write_eval_files
from transformers import PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"


@pytest.fixture
def command(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> list[str]:
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    config = tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl"))
    files = write_eval_files(tmp_path / "files", items=12)
    return [sys.executable, str(SCRIPT), "harness", str(config), f"evaluate.task_data={files}"]


def test_a_task(command: list[str]) -> None:
    given = [*command, "evaluate.tasks=[piqa_local, lambada_local]", "--repeats", "1"]
    printed = subprocess.run(given, check=True, capture_output=True, text=True).stdout
    found = json.loads(printed.splitlines()[-1])
    piqa = found["tasks"]["piqa_local"]
    assert (piqa["items"], piqa["requests"]) == (12, 24)
    assert math.isclose(piqa["of_decoder"], piqa["harness"] / piqa["decoder"])
    assert math.isclose(piqa["of_logits"], piqa["harness"] / piqa["logits"])
    assert f"| piqa_local | 12 | {piqa['tokens']:,} | {piqa['harness']:,.0f} |" in printed
    assert "| lambada_local | 12 |" in printed and found["date"] and found["commit"]


def test_a_run_without_tasks_is_a_mistake(command: list[str]) -> None:
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: evaluate.tasks []: nothing to run")


def test_only_tasks_need_lm_eval(command: list[str]) -> None:
    without = "import sys; sys.modules['lm_eval'] = None; import bench; sys.exit(bench.main(sys.argv[1:]))"
    given = [sys.executable, "-c", without, *command[2:], "evaluate.tasks=[piqa_local]"]
    refused = subprocess.run(given, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert refused.returncode == 2 and "harness: needs the package lm-eval; run" in refused.stderr
