"""Stopping on a signal: all processes stop at the same point, so that what they write belongs together."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import PartialState

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of Slurm: at preemption or scancel, and that of `--signal`
EXIT_PREEMPTED = 85  # of the program: stopped by a signal, goes on when started again with --resume


class Preempted(Exception):
    """A signal asked for the end. All processes raise it at the same call of :func:`stop_if_asked`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")


class _Watch:
    """``asked``: the signal that came; None while nobody watches. ``group``: of all processes, on their CPUs, so that
    asking does not wait for the GPU."""

    asked: int | None = None
    group: dist.ProcessGroup | None = None


@contextlib.contextmanager
def watch(state: PartialState) -> Iterator[None]:
    """Inside: SIGTERM and SIGUSR1 do not end the process but are kept for :func:`stop_if_asked`."""

    def keep(number: int, frame: FrameType | None) -> None:
        _Watch.asked = number

    _Watch.asked, _Watch.group = 0, dist.new_group(backend="gloo") if state.num_processes > 1 else None
    before = [(number, signal.signal(number, keep)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        _Watch.asked = _Watch.group = None


def stop_if_asked() -> None:
    """Raises :class:`Preempted` in every process if a signal came to one of them. All processes must call it as often;
    without :func:`watch` it does nothing."""
    if _Watch.asked is None:
        return
    asked = torch.tensor(_Watch.asked)
    if _Watch.group is not None:
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=_Watch.group)
    if asked:
        raise Preempted(int(asked))


def requeue() -> str:
    """Puts this Slurm job back into the queue; returns a line that says what was done."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not shutil.which("scontrol"):
        return "--requeue: no Slurm job here; start it again with --resume"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return f"job {job} cannot be requeued (Slurm does not answer); queue it again by: scontrol requeue {job}"
    reason = " ".join(done.stderr.split())
    return f"job {job} cannot be requeued ({reason})" if done.returncode else f"job {job} is in the queue again"


def restarted() -> bool:
    """Whether Slurm runs this job again, after a requeue or the loss of a node."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
