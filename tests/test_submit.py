"""Evaluation jobs of checkpoints, with an ``sbatch`` that keeps what it is asked for; a real one: test_slurm.py."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from transformers import PreTrainedTokenizerFast

import evaluate_run
from lp_train import finetune
from lp_train.cluster.preemption import requeue
from lp_train.cluster.submit import submit

SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" | paste -sd '|' >>"$ASKED"
env | grep -E '^(SLURM_|LP_WORLD_SIZE|RANK)' >>"$ASKED.env"
[ -z "$REFUSED" ] || { echo "$REFUSED" >&2; exit 1; }
echo 4242
"""


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    own = {"ASKED": str(tmp_path / "asked"), "REFUSED": "", "LP_EVALUATE_OPTIONS": "--time=5 --mem=1G"}
    own |= {"SLURM_JOB_ID": "7", "SLURM_CONF": "/conf", "LP_WORLD_SIZE": "1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    return tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl"))


def test_a_slurm_that_does_not_answer_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", late)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "checkpoint-2").mkdir()
    assert "timed out after 60 seconds" in submit(tmp_path, 2)
    assert requeue() == "job 7 cannot be requeued (Slurm does not answer); queue it again by: scontrol requeue 7"


def test_each_checkpoint_has_a_job_and_a_row(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first checkpoint gives way to the second before its job runs."""
    assert finetune.main([str(config), "evaluate.submit=slurm", "train.save_total_limit=1"]) == 0
    run, asked = config.parent / "run", (config.parent / "asked").read_text().splitlines()
    assert f"checkpoint-2: evaluation job 4242, its row comes into {run}/evaluations.md" in capsys.readouterr().out
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    assert set((config.parent / "asked.env").read_text().split()) == {"SLURM_CONF=/conf"}
    jobs = [line.split("|") for line in asked]
    assert [[*job[:1], *job[2:5]] for job in jobs] == [
        ["--parsable", "--time=5", "--mem=1G", "slurm/evaluate.sbatch"]
    ] * 2
    assert jobs[0][1] == f"--output={run}/evaluations/step-2/slurm-%j.out"

    rows = []
    for job in reversed(jobs):  # in any order
        assert evaluate_run.main([*job[5:], "evaluate.generation_prompts=0"]) == 0
        rows.append(re.findall(r"^\| (\d+) \| (\S+) \|", (run / "evaluations.md").read_text(), re.MULTILINE))
    assert [[step for step, _ in found] for found in rows] == [["4"], ["2", "4"]]
    recovered = json.loads((run / "report.json").read_text())["recovered"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    during = {line["step"]: line["eval_nll"] for line in logged if "eval_nll" in line}
    assert dict(rows[1]) == {"2": f"{during[2]:.4f}", "4": f"{recovered['nll']:.4f}"}
    assert str(rows[1][0][1]) in (run / "report.md").read_text().partition("## Checkpoints")[2]


def test_a_refused_job_costs_a_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSED", "sbatch: error: invalid partition")
    assert finetune.main([str(config), "evaluate.submit=slurm", "train.max_steps=2"]) == 0
    line = "checkpoint-2 is not evaluated (sbatch: error: invalid partition); do it by: sbatch --parsable --output="
    assert line in capsys.readouterr().out
