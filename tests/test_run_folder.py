"""What a run folder tells about how it was made, and checkpoints that cannot be read."""

import contextlib
import json
import subprocess
from collections.abc import Callable
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


@pytest.mark.parametrize("point", range(6))
def test_a_checkpoint_is_whole_or_not_there(point: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended before each of the points of writing the second one: two files, their list and their folder to the disk,
    the renaming, the renaming to the disk."""
    done: list[str] = []

    def unless_ended(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def made(path: Path, *arguments: object) -> object:
            if len(done) == point and path.is_relative_to(tmp_path / "aside" / "checkpoint-2"):
                raise InterruptedError
            done.append(f"{name} {path.name}")
            return call(path, *arguments)

        return made

    for step in (1, 2):
        written = tmp_path / "aside" / f"checkpoint-{step}"
        written.mkdir(parents=True)
        for name in ("weights", "optimizer"):
            (written / name).write_bytes(b"abc")
        if step == 2:
            monkeypatch.setattr(checkpoint, "_to_disk", unless_ended("disk", checkpoint._to_disk))
            monkeypatch.setattr(Path, "rename", unless_ended("rename", Path.rename))
        with contextlib.suppress(InterruptedError):
            checkpoint.publish(written, tmp_path / f"checkpoint-{step}")
    if ended := point < 5:
        assert len(done) == point
    else:
        assert set(done[:4]) == {f"disk {n}" for n in ("weights", "optimizer", checkpoint.MANIFEST, "checkpoint-2")}
        assert done[4:] == ["rename checkpoint-2", f"disk {tmp_path.name}"]
    assert checkpoint.newest_whole(tmp_path, print) == tmp_path / ("checkpoint-1" if ended else "checkpoint-2")
    assert (tmp_path / "checkpoint-2").exists() != ended
