"""The folder of one run: opened, resumed, and never mixed with another."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from accelerate import PartialState
from torch import nn

from lp_train.config import Config, config_to_yaml
from lp_train.distill.trainer import TOTALS
from lp_train.errors import UserError
from lp_train.models import check_stamp

CONFIG = "resolved_config.yaml"  # written first; it marks a folder as ours
BEFORE_TRAINING = {CONFIG, "wandb_id"}  # all that a run leaves which was stopped before its first step


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


def checkpoint_to_resume(folder: Path, model: nn.Module, resume: bool) -> str | None:
    """The newest whole checkpoint, of this base and plan; None to start from the beginning.

    ``totals.json`` is the last file of a checkpoint: one without it was being written when the run was killed.
    """
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TOTALS}")] if resume else []
    if not whole:
        return None
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    check_stamp(newest, model)
    return str(newest)


def open_run_folder(folder: Path, config: Config, state: PartialState, resume: bool) -> None:
    """Makes the folder this run's: without ``resume`` what an earlier one left is deleted. Call it as late as possible.

    The old run goes aside as a whole and the new configuration comes in as a whole, so that a kill leaves either run's.
    """
    if state.is_main_process:
        new, old = (Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder)) for name in ("new", "old"))
        (new / CONFIG).write_text(config_to_yaml(config))
        for path in [] if resume else folder.iterdir():
            if path not in (new, old):
                path.rename(old / path.name)
        os.replace(new / CONFIG, folder / CONFIG)
        for emptied in (new, old):
            shutil.rmtree(emptied)
    state.wait_for_everyone()
