"""Weights & Biases through the Trainer: one run per job, its id kept in the run folder, offline where it must be."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lp_train.config import TrackConfig
from lp_train.errors import UserError
from lp_train.evaluation.report import fidelity_table

HOST = "https://api.wandb.ai"


def report_to(config: TrackConfig) -> str:
    """The Trainer's ``report_to``: wandb or none.

    Raises:
        UserError: ``track.wandb`` is online or offline and wandb is not installed.
    """
    installed = importlib.util.find_spec("wandb") is not None
    if config.wandb == "off" or (config.wandb == "auto" and not installed):
        return "none"
    if not installed:
        raise UserError(f"track.wandb {config.wandb!r}: needs the package wandb; run `pip install wandb`, or set off")
    return "wandb"


def start(config: TrackConfig, folder: Path, run_name: str) -> str:
    """Sets W&B's environment for the Trainer's callback; returns :func:`report_to`."""
    if report_to(config) == "none":
        return "none"
    mode = config.wandb
    if mode == "auto":
        mode = "online" if _has_key() and _reachable() else "offline"
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    os.environ.setdefault("WANDB_MODE", mode)
    os.environ.update(
        WANDB_PROJECT=config.project,
        WANDB_NAME=config.name or run_name,
        WANDB_DIR=str(folder),
        WANDB_RUN_ID=id_file.read_text().strip(),
        WANDB_RESUME="allow",
        **({"WANDB_TAGS": ",".join(config.tags)} if config.tags else {}),
    )
    return "wandb"


def finish(report: dict[str, Any], folder: Path) -> None:
    """Puts the report's figures, its table and the plots of the run folder into W&B's run, and closes it. Does nothing
    without a run."""
    if importlib.util.find_spec("wandb") is None:
        return
    import wandb

    if wandb.run is None:
        return
    for name in ("sequential", "paired", "recovered", "recovery", "train"):
        for key, value in report[name].items():
            wandb.run.summary[f"{name}/{key}"] = value
    table = fidelity_table([report])
    shown: dict[str, Any] = {"report": wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])}
    shown |= {f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))}
    wandb.log(shown)
    wandb.finish()


def _host() -> str:
    return urlparse(os.environ.get("WANDB_BASE_URL", HOST)).hostname or ""


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(timeout: float = 3.0) -> bool:
    try:
        socket.create_connection((_host(), 443), timeout=timeout).close()
    except OSError:
        return False
    return True
