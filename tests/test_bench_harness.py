"""``scripts/bench.py harness`` on a tiny model: it counts what it says it counts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from eval_files import write_eval_files
from transformers import PreTrainedTokenizerFast

import bench
from benchmarks import quantization

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"


@pytest.fixture
def command(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> list[str]:
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    config = tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl"))
    files = write_eval_files(tmp_path / "files", items=12)
    return [sys.executable, str(SCRIPT), "harness", str(config), f"evaluate.task_data={files}"]


def test_a_task(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*command[2:], "evaluate.tasks=[piqa_local, lambada_local]", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    piqa = found["tasks"]["piqa_local"]
    assert (piqa["items"], piqa["requests"]) == (12, 24)
    assert math.isclose(piqa["of_decoder"], piqa["harness"] / piqa["decoder"])
    assert math.isclose(piqa["of_logits"], piqa["harness"] / piqa["logits"])
    assert f"| piqa_local | 12 | {piqa['tokens']:,} | {piqa['harness']:,.0f} |" in printed
    assert "| lambada_local | 12 |" in printed and found["date"] and found["commit"]


def test_a_run_without_tasks_is_a_mistake(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(command[2:]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: evaluate.tasks []: nothing to run")


def test_only_tasks_need_lm_eval(command: list[str]) -> None:
    without = "import sys; sys.modules['lm_eval'] = None; import bench; sys.exit(bench.main(sys.argv[1:]))"
    given = [sys.executable, "-c", without, *command[2:], "evaluate.tasks=[piqa_local]"]
    refused = subprocess.run(given, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert refused.returncode == 2 and "harness: needs the package lm-eval; run" in refused.stderr


def test_a_second_rounding_error_is_as_large_as_the_first() -> None:
    true = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    blocks = true.unflatten(1, (-1, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    level = (high - low) / 15
    rounded = (low + ((blocks - low) / level).round() * level).flatten(1)
    second = quantization.rounding_error(rounded, torch.Generator().manual_seed(1))
    assert (second.unflatten(1, (-1, 32)).abs() <= level / 2 + 1e-6).all()
    inner = ((rounded - true) != 0) & ((rounded - true).abs() > 1e-6)  # a block's ends are levels, so they are exact
    assert math.isclose(second.std().item(), (rounded - true)[inner].std().item(), rel_tol=0.05)
    assert not torch.equal(second, quantization.rounding_error(rounded, torch.Generator().manual_seed(2)))


def test_tasks_under_a_second_rounding_error(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config, data = command[3:]
    assert quantization.main([config, "--seeds", "2", data, "evaluate.tasks=[piqa_local]"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])["figures"]
    assert [line["seed"] for line in figures] == [None, 0, 1]
    difference = sum(line["piqa_local"] for line in figures[1:]) / 2 - figures[0]["piqa_local"]
    assert f"| {difference:+.4f} |" in printed
    assert quantization.main([config, data]) == 2
