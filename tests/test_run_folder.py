"""What a run folder tells about how it was made, and checkpoints that cannot be read."""

import contextlib
import json
import subprocess
import tempfile
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


def test_a_relative_folder_is_emptied_where_temporary_paths_are_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are from Python 3.12 on."""
    monkeypatch.chdir(tmp_path)
    relative = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *a, **b: str(Path(relative(*a, **b)).absolute()))
    (folder := Path("run")).mkdir()
    (folder / "old").touch()
    config = load_config(write_config(tmp_path / "tiny.yaml", tmp_path / "model", tmp_path / "text.jsonl"))
    run_folder.open_run_folder(folder, config, PartialState(cpu=True), resume=False)
    assert {path.name for path in folder.iterdir()} == {run_folder.CONFIG, "starts"}


def written(folder: Path, step: int) -> Path:
    """A checkpoint that is not published yet."""
    aside = folder / "aside" / f"checkpoint-{step}"
    aside.mkdir(parents=True)
    for name in ("weights", "optimizer"):
        (aside / name).write_bytes(b"abc")
    return aside


def test_a_checkpoint_that_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.publish(written(tmp_path, step), tmp_path / f"checkpoint-{step}")
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "weights").unlink()
    (tmp_path / "checkpoint-3" / "weights").mkdir()  # opened, it is an error of the system
    said: list[str] = []
    assert checkpoint.newest_whole(tmp_path, said.append) == tmp_path / "checkpoint-1"
    assert "checkpoint-3 is left out: cannot be read" in said[0] and said[1].endswith("weights is missing")


@pytest.mark.parametrize("point", range(7))
def test_a_checkpoint_is_whole_or_not_there(point: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing the second one ends before each of its points, or not at all: two files, their list and their folder
    go to the disk, the folder gets its name, the name goes to the disk."""
    done: list[str] = []

    def until_point(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def made(path: Path, *arguments: object) -> object:
            if len(done) == point:
                raise InterruptedError
            done.append(f"{name} {path.name}")
            return call(path, *arguments)

        return made

    checkpoint.publish(written(tmp_path, 1), tmp_path / "checkpoint-1")
    second = written(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "_to_disk", until_point("disk", checkpoint._to_disk))
    monkeypatch.setattr(Path, "rename", until_point("rename", Path.rename))
    with contextlib.suppress(InterruptedError):
        checkpoint.publish(second, tmp_path / "checkpoint-2")
    contents = {f"disk {name}" for name in ("weights", "optimizer", checkpoint.MANIFEST, "checkpoint-2")}
    assert len(set(done)) == point and set(done[:4]) <= contents
    assert done[4:] == ["rename checkpoint-2", f"disk {tmp_path.name}"][: max(0, point - 4)]
    named = point > 4
    assert checkpoint.newest_whole(tmp_path, print) == tmp_path / f"checkpoint-{2 if named else 1}"
    assert (tmp_path / "checkpoint-2").exists() == named
