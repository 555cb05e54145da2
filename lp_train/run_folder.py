"""The folder of one run: opened, resumed, and never mixed with another."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import PartialState
from torch import nn

from lp_train.config import Config, config_to_yaml
from lp_train.distill.trainer import TOTALS
from lp_train.errors import UserError
from lp_train.models import check_stamp

CONFIG = "resolved_config.yaml"  # written first; it marks a folder as ours
BEFORE_TRAINING = {CONFIG, "wandb_id"}  # all that a run leaves which stopped at a mistake


def open_run_folder(config: Config, state: PartialState, resume: bool, overwrite: bool) -> Path:
    """``train.output_dir``, empty or to be resumed, with the resolved configuration in it.

    Raises:
        UserError: not empty and neither resume nor overwrite; overwrite of a folder that no run wrote; not writable.
    """
    folder = Path(config.train["output_dir"]).expanduser()
    if state.is_main_process:
        if folder.is_dir() and {path.name for path in folder.iterdir()} - BEFORE_TRAINING and not resume:
            _clear(folder, overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(config_to_yaml(config))
        except OSError as error:
            raise UserError(
                f"train.output_dir {str(folder)!r}: cannot be written ({error.strerror}); name another"
            ) from None
    state.wait_for_everyone()
    return folder


def _clear(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UserError(
            f"train.output_dir {str(folder)!r}: not empty; go on with --resume, delete it with --overwrite, "
            "or name another"
        )
    if not (folder / CONFIG).exists():
        raise UserError(f"train.output_dir {str(folder)!r}: no run wrote this folder, so --overwrite leaves it alone")
    shutil.rmtree(folder)


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
