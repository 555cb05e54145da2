"""The folder of one run: opened, resumed, and never mixed with another."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from lp_train import models
from lp_train.cluster import engine
from lp_train.cluster.checkpoint import SAVING, newest_whole
from lp_train.cluster.launch import say
from lp_train.config import Config, config_to_yaml
from lp_train.distill.trainer import TOTALS
from lp_train.errors import UserError
from lp_train.evaluation import report as reports

CONFIG = "resolved_config.yaml"  # written first; it marks a folder as ours
CODE = Path(__file__).parent  # in a checkout
LOCK = ".lock"  # there while a process writes the folder
STARTS = "starts"  # what each start of the run was made by
# all that a run leaves which was stopped before its first step:
BEFORE_TRAINING = {CONFIG, LOCK, STARTS, "wandb_id", "wandb"}


def check_run_folder(config: Config, resume: bool, overwrite: bool) -> Path:
    """``train.output_dir``, which may be written to; nothing in it changes yet.

    Raises:
        UserError: not empty and neither resume nor overwrite; overwrite of a folder that no run wrote; not writable.
    """
    folder = Path(config.train["output_dir"]).expanduser()
    named = f"train.output_dir {str(folder)!r}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise UserError(f"{named}: cannot be written ({error.strerror}); name another") from None
    if {path.name for path in folder.iterdir()} - BEFORE_TRAINING and not resume:
        if not overwrite:
            raise UserError(f"{named}: not empty; go on with --resume, delete it with --overwrite, or name another")
        if not (folder / CONFIG).exists():
            raise UserError(f"{named}: no run wrote this folder, so --overwrite leaves it alone")
    return folder


@contextlib.contextmanager
def locked(folder: Path, state: PartialState) -> Iterator[None]:
    """Inside: no other run writes the folder. The lock ends with the process, however that ends.

    Raises:
        UserError: another run holds it.
    """
    if not state.is_main_process:
        yield
        return
    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            rule = f"{file.read().strip()} is writing it; wait for it, or name another"
            raise UserError(f"train.output_dir {str(folder)!r}: {rule}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def checkpoint_to_resume(folder: Path, model: nn.Module, state: PartialState, resume: bool) -> str | None:
    """The newest whole checkpoint, of this base and plan, the same on all processes; None to start from the beginning.

    Those that are damaged or half written are left out, with a message.

    Raises:
        UserError: it is of another base, plan or engine, or of another number of processes under DeepSpeed, which
            leaves each process its part of the optimizer.
    """
    newest = [newest_whole(folder, say) if resume and state.is_main_process else None]
    broadcast_object_list(newest)
    if newest[0] is None:
        return None
    models.check_stamp(newest[0], model)
    (processes, written_by), ours = json.loads((newest[0] / TOTALS).read_text())["processes"], engine.asked()
    whole = written_by in engine.WHOLE and ours in engine.WHOLE
    if not whole and (written_by != ours or (ours.startswith("ZeRO") and processes != state.num_processes)):
        was, now = f"{processes} x {written_by}", f"{state.num_processes} x {ours}"
        rule = f"written by processes {was}, this run has {now}; launch it as before, or name another folder"
        raise UserError(f"{newest[0]}: {rule}")
    if processes != state.num_processes:
        say(f"note: written by {processes} processes, this run has {state.num_processes}; only dropout differs")
    return str(newest[0])


def open_run_folder(folder: Path, config: Config, state: PartialState, resume: bool) -> None:
    """Makes the folder this run's: without ``resume`` what an earlier one left is deleted. Call it as late as possible.

    The old run goes aside as a whole and the new configuration comes in as a whole, so that a kill leaves either run's.
    """
    if state.is_main_process:
        new, old = (Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder)) for name in ("new", "old"))
        (new / CONFIG).write_text(config_to_yaml(config))
        for path in [] if resume else folder.iterdir():
            if path.name not in (new.name, old.name, LOCK):  # the paths themselves: absolute from Python 3.12 on
                path.rename(old / path.name)
        os.replace(new / CONFIG, folder / CONFIG)
        _record_start(folder, state)
        for emptied in (new, old):
            shutil.rmtree(emptied)
        shutil.rmtree(folder / SAVING, ignore_errors=True)  # of a run that was killed while it saved
    state.wait_for_everyone()


def _record_start(folder: Path, state: PartialState) -> None:
    """``starts/N/``: configuration, command, environment, the code's changes since its commit with the names of files
    that git does not know, and the job script that Slurm ran (``LP_SBATCH``)."""
    command = [*sys.argv[0].split(), *sys.argv[1:]] if sys.argv[0].startswith("lp-train ") else sys.argv
    found: dict[str, Any] = reports.environment(state.device) | {"command": command, "host": socket.gethostname()}
    found["packages"] = {package.name: package.version for package in metadata.distributions()}
    job = found["job"] = os.environ.get("SLURM_JOB_ID")
    changes = _git("diff", "HEAD", "--binary") + _git("ls-files", "--others", "--exclude-standard")

    def write(new: Path) -> None:
        shutil.copy(folder / CONFIG, new)
        (new / "environment.json").write_text(reports.as_json(found))
        if changes:
            (new / "code.diff").write_bytes(changes)
        if job and Path(script := os.environ.get("LP_SBATCH", "")).is_file():
            shutil.copy(script, new / "job.sbatch")

    models.write_folder(folder / STARTS / str(1 + len(list(folder.glob(f"{STARTS}/*")))), write)


def _git(*arguments: str) -> bytes:
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "-C", str(CODE), *arguments], capture_output=True).stdout
    return b""
