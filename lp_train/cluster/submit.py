"""``evaluate.submit: slurm``: one evaluation job for each checkpoint, submitted when it is saved."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from lp_train.cluster.launch import say
from lp_train.config import Config
from lp_train.errors import UserError
from lp_train.evaluation.report import EVALUATIONS
from lp_train.models import write_folder

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = re.compile(r".*\.(pt|pth|bin)|(trainer_state|totals|manifest)\.json")  # what only training needs
OF_THIS_JOB = re.compile(
    r"SLURM_(?!CONF$)|LP_WORLD_SIZE|ACCELERATE_(?!USE_CPU$)|TORCHELASTIC|MASTER_|\w*(RANK|WORLD_SIZE)$"
    r"|OMP_NUM_THREADS$|CUDA_VISIBLE_DEVICES$"
)


def check_submit(config: Config) -> None:
    """Raises UserError where ``evaluate.submit`` is slurm and there is no Slurm."""
    if config.evaluate.submit and not shutil.which("sbatch"):
        rule = "no sbatch on this machine; start the run under Slurm, or set it to null"
        raise UserError(f"evaluate.submit 'slurm': {rule}")


class SubmitEvaluation(TrainerCallback):
    """Submits when the Trainer has saved. The checkpoint that a signal makes is the resumed run's, and is not
    evaluated."""

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            say(submit(Path(args.output_dir).absolute(), state.global_step))


def submit(folder: Path, step: int) -> str:
    """Submits the evaluation of a run's checkpoint; returns a line that says what was done. Never raises for Slurm:
    training goes on. The job's options beside those of the script are in ``LP_EVALUATE_OPTIONS``."""
    checkpoint, target = folder / f"checkpoint-{step}", folder / EVALUATIONS / f"step-{step}"

    def copy(new: Path) -> None:  # linked where that can be: the checkpoint itself gives way to newer ones
        for path in checkpoint.iterdir():
            if path.is_file() and not LEFT_OUT.fullmatch(path.name):
                try:
                    os.link(path, new / path.name)
                except OSError:
                    shutil.copy(path, new)

    command = ["sbatch", "--parsable", f"--output={target}/slurm-%j.out"]
    command += shlex.split(os.environ.get("LP_EVALUATE_OPTIONS", ""))
    command += ["slurm/evaluate.sbatch", str(folder / "resolved_config.yaml"), str(target)]
    env = {name: value for name, value in os.environ.items() if not OF_THIS_JOB.match(name)}
    try:
        write_folder(target, copy)
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        problem = " ".join(done.stderr.split()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        return f"{checkpoint.name} is not evaluated ({problem}); do it by: {shlex.join(command)}"
    return f"{checkpoint.name}: evaluation job {done.stdout.strip()}, its row comes into {folder}/evaluations.md"
