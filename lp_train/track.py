"""Weights & Biases through the Trainer: one run per job, its id kept in the run folder, offline where it must be."""

import contextlib
import importlib.util
import netrc
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lp_train.cluster.launch import say
from lp_train.config import TrackConfig
from lp_train.errors import UserError, one_line
from lp_train.evaluation.page import Table
from lp_train.evaluation.tables import fidelity

HOST = "https://api.wandb.ai"
STEP = "train/global_step"  # as the Trainer's callback names our step

FINISH = 300  # seconds that the end waits for an upload; what is left stays in the folder


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


def choose_mode(config: TrackConfig) -> tuple[str, str]:
    """(online, offline or off, and why). ``WANDB_MODE`` goes before ``track.wandb``."""
    if report_to(config) == "none":
        return "off", "track.wandb is off" if config.wandb == "off" else "the package wandb is not installed"
    if mode := os.environ.get("WANDB_MODE"):
        return mode, f"WANDB_MODE is {mode}"
    if config.wandb == "offline":
        return "offline", "track.wandb is offline"
    if not _has_key():
        return "offline", f"no key for {_host()}; run `wandb login`"
    if config.wandb == "online" or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return "online", "as asked" if config.wandb == "online" else "through the proxy of HTTPS_PROXY"
    return ("online", f"{_host()} answers") if _reachable() else ("offline", f"{_host()} cannot be reached")


def start(config: TrackConfig, folder: Path, run_name: str, record: Mapping[str, Any]) -> bool:
    """Starts W&B's run of this folder, or goes on with it; the Trainer's callback finds it. ``record`` becomes its
    configuration. What W&B refuses is told in a line, and the run is kept in the folder. Returns whether there is one.
    """
    mode: Any
    mode, why = choose_mode(config)
    if mode == "off":
        return False
    import wandb

    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(os.urandom(4).hex())
    options: dict[str, Any] = {"project": config.project, "name": config.name or run_name, "tags": config.tags}
    options |= {"dir": str(folder), "id": id_file.read_text().strip(), "resume": "allow", "config": dict(record)}
    options["settings"] = wandb.Settings(silent=True, finish_timeout=FINISH)
    try:
        wandb.init(mode=mode, **options)
    except wandb.Error as error:
        mode, why = "offline", one_line(error)
        wandb.teardown()  # what was begun holds the id
        wandb.init(mode=mode, **options)
    if mode == "offline" and config.wandb != "offline":
        say(f"W&B: {why}; the run is kept in {folder}/wandb, for: bash scripts/wandb_sync.sh {folder}")
    wandb.define_metric(STEP)
    wandb.define_metric("eval/*", step_metric=STEP)  # W&B's own step starts again when a run is resumed offline
    return True


def finish(document: Mapping[str, Any], tables: Mapping[str, Table], folder: Path) -> None:
    """Puts the figures of a report or an evaluation, its tables and the plots of the run folder into W&B's run, and
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
    for name, table in tables.items():
        columns: list[str | int] = [column.replace("\n", ", ") for column in table.columns]
        shown[f"tables/{name}"] = wandb.Table(columns=columns, data=[list(row) for row in table.rows])
    shown |= {f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))}
    wandb.log(shown)
    wandb.finish()


def _host() -> str:
    return urlparse(os.environ.get("WANDB_BASE_URL", HOST)).netloc


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable() -> bool:
    url = urlparse(os.environ.get("WANDB_BASE_URL", HOST))
    with contextlib.suppress(OSError):
        socket.create_connection((url.hostname or "", url.port or 443), timeout=3).close()
        return True
    return False
