"""What a run folder tells about how it was made, and checkpoints that cannot be read."""

import json
import subprocess
from pathlib import Path

import pytest
from accelerate import PartialState
from tiny_run import write_config

from lp_train import run_folder
from lp_train.cluster import checkpoint
from lp_train.config import load_config


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_each_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "known.py").write_text("old = 1\n")
    git(code, "init")
    git(code, "add", ".")
    git(code, "commit", "-m", "first")
    monkeypatch.setattr(run_folder, "CODE", code)
    (tmp_path / "script").write_text("#!/bin/bash\n#SBATCH --nodes=2\n")
    folder, state = tmp_path / "run", PartialState(cpu=True)
    folder.mkdir()
    config = load_config(write_config(tmp_path / "tiny.yaml", tmp_path / "model", tmp_path / "text.jsonl"))

    run_folder.open_run_folder(folder, config, state, resume=False)
    (code / "known.py").write_text("new = 2\n")
    (code / "unknown.py").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("LP_SBATCH", str(tmp_path / "script"))
    run_folder.open_run_folder(folder, config, state, resume=True)

    first, second = (folder / "starts" / name for name in "12")
    assert {path.name for path in first.iterdir()} == {"resolved_config.yaml", "environment.json"}
    diff = (second / "code.diff").read_text()
    assert "-old = 1\n+new = 2\n" in diff and diff.endswith("unknown.py\n")
    assert (second / "job.sbatch").read_text() == (tmp_path / "script").read_text()
    assert load_config(second / "resolved_config.yaml") == config
    found = json.loads((second / "environment.json").read_text())
    assert found["job"] == "7" and found["packages"]["torch"] == found["versions"]["torch"]

    run_folder.open_run_folder(folder, config, state, resume=False)  # another run: what was is gone
    assert [path.name for path in (folder / "starts").iterdir()] == ["1"]


def test_a_checkpoint_that_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        written = tmp_path / "aside"
        written.mkdir()
        (written / "weights").write_bytes(b"abc")
        checkpoint.publish(written, tmp_path / f"checkpoint-{step}")
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "weights").unlink()
    (tmp_path / "checkpoint-3" / "weights").mkdir()  # opened, it is an error of the system
    said: list[str] = []
    assert checkpoint.newest_whole(tmp_path, said.append) == tmp_path / "checkpoint-1"
    assert "checkpoint-3 is left out: cannot be read" in said[0] and said[1].endswith("weights is missing")
