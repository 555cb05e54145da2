"""Processes of the real program without the dozen seconds of imports that each would begin with: one process imports
the libraries once, and for each program that a test starts a fork of it becomes that program.

A fork is a process of its own: signals, limits, exit code, environment and command line are those of a program started
afresh. What they share is the seed of Python's hashes; ``launched.Program.run(..., afresh=True)`` has another one.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Timer

READY = b"ready"
LARGEST = 2**17  # bytes of a request: an environment and a command line


class Forked:
    """Of ``subprocess.Popen`` what the tests use; output and errors are one pipe of text."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        ours, theirs = os.pipe()
        try:
            self.pid = _ask({"command": list(command), "environment": dict(environment), "folder": os.getcwd()}, theirs)
        finally:
            os.close(theirs)
        self.stdout = open(ours, encoding="utf-8", errors="replace")  # noqa: SIM115  (closed when it is read)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, None]:
        late = Timer(timeout, self.kill)
        late.start()
        with self.stdout:
            output = self.stdout.read()
        self.returncode = self.returncode if self.returncode is not None else _ask({"wait": self.pid})
        late.cancel()
        return output, None


@cache
def possible() -> bool:
    """Whether programs can be forked here: on Linux, and where no thread of a library is lost in a fork."""
    return sys.platform == "linux" and _parent().recv(LARGEST) == READY


@cache
def _parent() -> socket.socket:
    """The process that forks, started when it is first asked for; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    theirs.close()
    return ours


def _ask(request: dict[str, object], *descriptors: int) -> int:
    message = json.dumps(request).encode()
    assert len(message) < LARGEST
    socket.send_fds(_parent(), [message], descriptors)
    return int(_parent().recv(LARGEST))


def _serve(channel: socket.socket) -> dict[str, object]:
    """Forks and waits as it is asked to; returns in each fork, with what it is to become."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, LARGEST, 1)
        if not message:
            sys.exit()
        request = json.loads(message)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
        elif child := os.fork():
            os.close(descriptors[0])
            channel.send(str(child).encode())
        else:
            for standard in (1, 2):
                os.dup2(descriptors[0], standard)
            os.close(descriptors[0])
            channel.close()
            return request


def _become(command: list[str], environment: dict[str, str], folder: str) -> None:
    """Goes on as ``python COMMAND...`` would; how it ends is how this process ends."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = command
    paths = environment.get("PYTHONPATH", "").split(":")
    sys.path[:] = [str(Path(command[0]).parent), *paths, *(path for path in sys.path[1:] if path not in paths)]
    runpy.run_path(command[0], run_name="__main__")


def _main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    import lp_train.evaluation.tasks  # and lm-eval with it
    import lp_train.finetune  # noqa: F401

    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    threads -= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # the second starts again in a fork
    if threads:
        sys.exit(f"{threads}: a thread of a library would not live on in a fork; programs are started afresh")
    channel.send(READY)
    del sys.modules["lp_train.finetune"]  # each fork is that program, and runs the file itself
    request = _serve(channel)
    _become(**request)  # type: ignore[arg-type]


if __name__ == "__main__":
    _main()
