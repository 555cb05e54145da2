"""Weights & Biases through the Trainer: one run per job, its id kept in the run folder, offline where it must be."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lp_train.config import TrackConfig
from lp_train.errors import UserError
from lp_train.evaluation.tables import fidelity, tables

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


def add(config: TrackConfig, folder: Path, run_name: str, document: Mapping[str, Any]) -> None:
    """Adds what was measured after a run to its W&B run; nothing where the run was not tracked."""
    if (folder / "wandb_id").exists() and start(config, folder, run_name) == "wandb":
        import wandb

        wandb.init()
        finish(document, folder)


def finish(document: Mapping[str, Any], folder: Path) -> None:
    """Puts the figures and tables of a report or an evaluation and the plots of the run folder into W&B's run, and
    closes it. Does nothing without a run."""
    if importlib.util.find_spec("wandb") is None:
        return
    import wandb

    if wandb.run is None:
        return
    parts = {**fidelity(document), **{name: document.get(name) or {} for name in ("recovery", "train")}}
    for name in ("sequential", "paired", "recovered", "recovery", "train"):
        for key, value in parts.get(name, {}).items():
            wandb.run.summary[f"{name}/{key}"] = value
    shown: dict[str, Any] = {}
    for name, table in tables(document).items():
        columns: list[str | int] = [column.replace("\n", ", ") for column in table.columns]
        shown[f"tables/{name}"] = wandb.Table(columns=columns, data=[list(row) for row in table.rows])
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
