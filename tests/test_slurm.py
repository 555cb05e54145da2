"""The job scripts under a real Slurm of two nodes on this host, started by ``slurm_up.sh``; skipped where it cannot."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import ROOT, Program, assert_went_on, losses, weights
from tiny_trainer import assert_same_weights
from transformers import PreTrainedTokenizerFast

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
STEPS = ("train.max_steps=30", "train.per_device_train_batch_size=1")


def say(script: str, *arguments: str) -> tuple[int, str, str]:
    """The script outside of a job."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env["LP_VENV"] = str(Path(sys.prefix))
    done = subprocess.run(["bash", f"slurm/{script}", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch")))
def test_a_job_script_helps_and_checks_before_it_is_submitted(script: str) -> None:
    code, out, _ = say(script, "--help")
    assert code == 0 and f"slurm/{script} " in out and "#SBATCH" not in out
    assert say(script)[0] == 2
    code, _, errors = say(script, "none.yaml", "runs/none")
    assert code == 2 and errors.startswith("error: none.yaml: no such file")
    code, _, errors = say(script, "configs/demo.yaml", "runs/none")
    assert code == 2 and "no Slurm job; submit it with sbatch" in errors


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        line = (folder / "slurm" / "env.sh").read_text().strip().removeprefix("export ")
        self.env = {**os.environ, **dict([line.split("=", 1)]), "LP_VENV": sys.prefix, "ACCELERATE_USE_CPU": "true"}
        self.env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self.env["LP_CONTAINER"] = (
            f"taskset -c {min(os.sched_getaffinity(0))}"  # one thread, as the run it is compared with
        )

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *command: str) -> str:
        return self.call("sbatch", "--parsable", f"--output={self.folder}/out-%A-%a.txt", *command)

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("out-*.txt")))

    def wait(self, what: Callable[[], object], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.output()
            time.sleep(0.5)

    def ended(self, job: str) -> bool:
        return not self.call("squeue", "-h", "-o", "%T", "-j", job)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid():
        pytest.skip("Slurm's daemons run as root here")
    folder = Path(tempfile.mkdtemp(prefix="lp_slurm"))  # pytest's own folders are closed to others, which munge refuses
    folder.chmod(0o755)
    script = [str(Path(__file__).with_name("slurm_up.sh"))]
    up = subprocess.run(["bash", *script, "start", str(folder / "slurm")], capture_output=True, text=True, timeout=120)
    try:
        if up.returncode:
            pytest.skip(f"Slurm does not start here: {up.stderr[-300:]}")
        yield Slurm(folder)
    finally:
        subprocess.run(["bash", *script, "stop", str(folder / "slurm")], capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Program:
    return Program(tmp_path_factory.mktemp("slurm"), tiny_tokenizer, *STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a signal to the job", "scontrol requeue"])
def test_a_stopped_job_is_queued_again_and_goes_on(slurm: Slurm, program: Program, how: str) -> None:
    if not (expected := program.folder / "whole").exists():
        program.run("whole")
    folder = program.folder / how.replace(" ", "_")
    job = slurm.submit("slurm/finetune.sbatch", str(program.config), f"train.output_dir={folder}", *STEPS)
    slurm.wait(lambda: (folder / "metrics.jsonl").exists() and max(losses(folder), default=0) >= 5)
    if how == "scontrol requeue":
        slurm.call("scontrol", "requeue", job)
    else:
        slurm.call("scancel", "--signal=USR1", job)
    slurm.wait(lambda: "PENDING" in slurm.call("squeue", "-h", "-o", "%T", "-j", job))
    assert not (folder / "report.json").exists()
    slurm.call("scontrol", "update", f"jobid={job}", "StartTime=now")
    slurm.wait(lambda: slurm.ended(job))
    assert (folder / "report.json").exists(), slurm.output()
    assert losses(folder) == losses(expected)
    assert_same_weights(weights(folder), weights(expected), 0)
    assert_went_on(folder)


@pytest.mark.slow
def test_the_demo_and_the_job_that_evaluates_its_checkpoint(slurm: Slurm) -> None:
    folder, small = slurm.folder / "demo", ("max_steps=2", "max_steps_float32=2", "eval_steps=2", "save_steps=2")
    evaluate = ("tokens=512", "prompt=null", "generation_prompts=0", "submit=slurm")
    options = [*(f"train.{option}" for option in small), *(f"evaluate.{option}" for option in evaluate)]
    job = slurm.submit("slurm/finetune.sbatch", "configs/demo.yaml", f"train.output_dir={folder}", *options)
    slurm.wait(lambda: not slurm.call("squeue", "-h"), seconds=600)
    assert (folder / "report.json").exists(), slurm.output()
    assert (folder / "starts" / "1" / "job.sbatch").read_bytes() == (ROOT / "slurm" / "finetune.sbatch").read_bytes()
    assert json.loads((folder / "starts" / "1" / "environment.json").read_text())["job"] == job
    outputs = "".join(path.read_text() for path in folder.glob("evaluations/*/slurm-*.out"))
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \|", (folder / "evaluations.md").read_text(), re.MULTILINE)
    assert [step for step, _ in rows] == ["2"], outputs
    recovered = json.loads((folder / "report.json").read_text())["recovered"]["nll"]
    assert float(rows[0][1]) == pytest.approx(recovered, abs=1e-4)
    assert "## Checkpoints" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_two_nodes_form_one_world(slurm: Slurm, program: Program) -> None:
    folder = program.folder / "nodes"
    output = f"train.output_dir={folder}"
    job = slurm.submit("slurm/finetune_multinode.sbatch", str(program.config), output, *STEPS, "train.max_steps=3")
    slurm.wait(lambda: slurm.ended(job))
    assert (folder / "report.json").exists(), slurm.output()
    assert json.loads((folder / "report.json").read_text())["environment"]["num_processes"] == 2


@pytest.mark.slow
def test_an_array_runs_each_line(slurm: Slurm, program: Program) -> None:
    folders = [program.folder / f"line{i}" for i in (1, 2)]
    configs = [program.config, Path(shutil.copy(program.config, program.folder / "other.yaml"))]
    lines = [f"{configs[i]} train.output_dir={f} train.max_steps=2 lora.r={i + 1}\n" for i, f in enumerate(folders)]
    (program.folder / "list.txt").write_text("# configurations and ranks\n" + "".join(lines))
    job = slurm.submit("--array=1-2", "slurm/sweep.sbatch", str(program.folder / "list.txt"))
    slurm.wait(lambda: slurm.ended(job))
    assert all((folder / "report.json").exists() for folder in folders), slurm.output()
    assert [min(min(t.shape) for t in weights(folder).values()) for folder in folders] == [1, 2]
