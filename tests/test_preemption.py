"""Signals, kills and what is left of them: the real program, ended at any moment, comes to the same result."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from launched import Program, assert_went_on, ends, evaluations, losses, until, weights
from tiny_trainer import assert_same_weights
from transformers import PreTrainedTokenizerFast

from lp_train.cluster import checkpoint
from lp_train.cluster.checkpoint import MANIFEST, damage, newest_whole
from lp_train.cluster.preemption import EXIT_PREEMPTED

pytestmark = pytest.mark.slow
OPTIONS = ("train.max_steps=12", "train.eval_steps=3", "train.save_steps=2", "train.per_device_train_batch_size=1")
DROPOUT = "lora.lora_dropout=0.1"
# Rows enough that the evaluation after step 3 is under way when the line of that step is read.
LONG_EVALUATION = ("evaluate.tokens=3000", "evaluate.batch_size=1", "evaluate.generation_prompts=0")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Program:
    return Program(tmp_path_factory.mktemp("preemption"), tiny_tokenizer, *OPTIONS, DROPOUT)


@pytest.fixture(scope="module")
def whole(program: Program) -> Path:
    """Started afresh, the runs that are compared with it are not: no result hangs on the seed of Python's hashes."""
    return program.run("whole", afresh=True)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bitwise: weights, the loss of each step and the figures of each evaluation."""
    assert_same_weights(weights(ours), weights(theirs), 0)
    assert losses(ours) == losses(theirs)
    assert evaluations(ours) == evaluations(theirs)


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGKILL, 1), (signal.SIGUSR1, 1), (signal.SIGKILL, 2), (signal.SIGTERM, 2)]
)
def test_a_run_that_was_ended_goes_on_bitwise(
    program: Program, request: pytest.FixtureRequest, number: signal.Signals, processes: int
) -> None:
    """Of two processes only one gets the signal; both stop at the same step."""
    if processes == 1:
        expected = request.getfixturevalue("whole")
    elif not (expected := program.folder / "whole2").exists():
        program.run("whole2", processes=2)
    name = f"{number.name}{processes}"
    started = program.start(name, processes=processes)
    until(started[0], "step 5/12")
    targets = started if number == signal.SIGKILL else started[-1:]
    for process in targets:
        process.send_signal(number)
    codes, output = ends(started)
    assert codes == [-9 if number == signal.SIGKILL else EXIT_PREEMPTED] * processes, output
    assert not (program.folder / name / "report.json").exists()
    assert_same_run(program.run(name, "--resume", processes=processes), expected)


@pytest.fixture(scope="module")
def long(program: Program) -> Path:
    return program.run("long", *LONG_EVALUATION)


def test_a_signal_in_an_evaluation_leaves_it_to_the_next_run(program: Program, long: Path) -> None:
    """Saving less often than the run that it is compared with, which moves nothing either."""
    seldom = (*LONG_EVALUATION, "train.save_steps=12")
    (started,) = program.start("cut", *seldom)
    until(started, "step 3/12")
    started.send_signal(signal.SIGTERM)
    codes, output = ends([started])
    assert codes == [EXIT_PREEMPTED], output
    folder = program.folder / "cut"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((folder / "checkpoint-3" / "totals.json").read_text())["evaluation_due"]
    assert not evaluations(folder)
    assert_same_run(program.run("cut", "--resume", *seldom), long)


def test_a_kill_in_an_evaluation_leaves_the_last_checkpoint(program: Program, long: Path) -> None:
    (started,) = program.start("cut2", *LONG_EVALUATION)
    until(started, "step 3/12")
    started.kill()
    assert ends([started])[0] == [-9]
    folder = program.folder / "cut2"
    assert newest_whole(folder, print) == folder / "checkpoint-2" and not evaluations(folder)
    assert_same_run(program.run("cut2", "--resume", *LONG_EVALUATION), long)


def test_a_kill_in_saving_leaves_the_checkpoint_before(program: Program, whole: Path) -> None:
    folder = program.folder / "saving"
    half = folder / checkpoint.SAVING / "checkpoint-4"
    for _ in range(5):  # times that the kill may come after the renaming
        (started,) = program.start("saving", "--overwrite")
        until(started, "step 3/12")
        late = time.monotonic() + 120
        while not half.exists():
            assert time.monotonic() < late and not (folder / "checkpoint-6").exists()
        started.kill()
        assert ends([started])[0] == [-9]
        if half.exists():
            break
    assert half.exists() and newest_whole(folder, print) == folder / "checkpoint-2"
    assert_same_run(program.run("saving", "--resume"), whole)
    assert not half.parent.exists()


def test_a_restarted_slurm_job_resumes_by_itself_and_overwrites_nothing(program: Program, whole: Path) -> None:
    (started,) = program.start("requeued", "--overwrite", "--requeue")
    until(started, "step 5/12")
    started.send_signal(signal.SIGUSR1)
    codes, output = ends([started])
    assert codes == [EXIT_PREEMPTED] and "no Slurm job here" in output
    folder = program.run("requeued", "--overwrite", SLURM_RESTART_COUNT="1")
    assert_same_run(folder, whole)
    assert_went_on(folder)


def test_damaged_and_half_written_checkpoints_are_left_out(program: Program, whole: Path) -> None:
    (started,) = program.start("damaged", "train.save_total_limit=20")
    until(started, "step 9/12")
    started.kill()
    ends([started])
    folder = program.folder / "damaged"
    (folder / "checkpoint-8" / "optimizer.pt").write_bytes((folder / "checkpoint-8" / "optimizer.pt").read_bytes()[:-1])
    scheduler = folder / "checkpoint-6" / "adapter_model.safetensors"
    scheduler.write_bytes(scheduler.read_bytes()[:-1] + b"?")
    (folder / "checkpoint-4" / MANIFEST).unlink()
    codes, output = ends(program.start("damaged", "--resume", "train.save_total_limit=20"))
    assert codes == [0], output
    for line in (
        "checkpoint-8 is left out: optimizer.pt is damaged",
        "checkpoint-6 is left out: adapter_model.safetensors is damaged",
        f"checkpoint-4 is left out: {MANIFEST} is missing",
    ):
        assert line in output
    assert_same_run(folder, whole)
    assert newest_whole(folder, print) == folder / "checkpoint-12"
    assert not [path.name for path in folder.glob("checkpoint-*") if damage(path)]  # made anew


def test_another_number_of_processes_goes_on(program: Program) -> None:
    """The global batches are the same ones; dropout would differ."""
    expected = program.run("even", "lora.lora_dropout=0")
    started = program.start("fewer", "lora.lora_dropout=0", processes=2)
    until(started[0], "step 5/12")
    for process in started:
        process.kill()
    ends(started)
    codes, output = ends(program.start("fewer", "lora.lora_dropout=0", "--resume"))
    assert codes == [0] and "note: written by 2 processes, this run has 1; only dropout differs" in output, output
    assert_same_weights(weights(program.folder / "fewer"), weights(expected), 1e-5)
    assert losses(program.folder / "fewer") == pytest.approx(losses(expected), rel=1e-5)


def test_two_runs_in_one_folder(program: Program) -> None:
    (first,) = program.start("shared", "train.max_steps=100000")
    until(first, "step 2/")
    codes, output = ends(program.start("shared", "--resume"))
    assert codes == [2]
    assert f"process {first.pid} on " in output and "is writing it; wait for it, or name another" in output
    first.send_signal(signal.SIGTERM)
    codes, output = ends([first])
    assert codes == [EXIT_PREEMPTED], output
    assert not (program.folder / "shared" / ".lock").exists()


def test_a_full_disk_while_saving(program: Program, whole: Path) -> None:
    """The limit is the size of a file: the base has been read, the optimizer's state is too long."""
    (started,) = program.start("full", "train.save_total_limit=20")
    until(started, "step 3/12")
    limit = (program.folder / "full" / "checkpoint-2" / "optimizer.pt").stat().st_size - 1
    resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (limit, limit))
    codes, output = ends([started])
    assert codes == [2], output
    folder = program.folder / "full"
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "cannot be saved" in line and "make room and go on with --resume; the last checkpoint is at" in line
    assert newest_whole(folder, print) == max(folder.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert_same_run(program.run("full", "--resume", "train.save_total_limit=20"), whole)


KILLS = int(os.environ.get("LP_KILLS", "2"))  # the twenty: LP_KILLS=20 pytest tests/test_preemption.py -k kills


def test_kills_at_random_moments(program: Program) -> None:
    total = 20 + 10 * KILLS  # more than a run takes in the seconds before the kills
    steps = (f"train.max_steps={total}", "train.eval_steps=5", "train.save_steps=3", "evaluate.batch_size=2")
    expected, folder, draw = program.run("unkilled", *steps), program.folder / "killed", random.Random(0)
    newest, ended = -1, []
    for kill in range(KILLS):
        (started,) = program.start("killed", *steps, *(["--resume"] if kill else []))
        until(started, "held-out nll")
        time.sleep(draw.uniform(0, 1))
        started.send_signal(draw.choice([signal.SIGTERM, signal.SIGKILL]))
        codes, output = ends([started])
        ended += codes
        assert codes[0] in (-9, EXIT_PREEMPTED), output
        whole = newest_whole(folder, print)
        step = int(whole.name.rpartition("-")[2]) if whole else -1
        assert step >= newest, output
        assert not [path.name for path in folder.glob("checkpoint-*") if checkpoint.damage(path)]
        newest = step
    assert set(ended) <= {-9, EXIT_PREEMPTED} and newest < total
    assert_same_run(program.run("killed", *steps, "--resume"), expected)


def test_a_world_of_another_size_than_the_job_is_refused(program: Program) -> None:
    codes, output = ends(program.start("alone", LP_WORLD_SIZE="2"))
    assert codes == [2], output
    assert "error: LP_WORLD_SIZE 2: the job has as many processes, this one sees a world of 1; look at" in output
