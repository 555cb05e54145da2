"""The real program as processes of the test's own, so that each can be signalled and has its own exit code."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forked import Forked, possible
from safetensors.torch import load_file
from tiny_run import save_model, write_config, write_text
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
ENGINES = {  # what `accelerate launch` sets for configs/accelerate/*.yaml, and where the CPU stands for a GPU
    "DDP": {},
    "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "ZeRO-2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "ZeRO-3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
PRETENDED = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
PATHS = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'scripts'}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


Process = Forked | subprocess.Popen[str]


def start(command: Sequence[str], processes: int = 1, afresh: bool = False, **environment: str) -> list[Process]:
    """``command``, a file and its arguments, as ranks of one world on gloo, as a launcher would start them; output goes
    to pipes. ``afresh``: with imports of its own, where it is the start itself that counts."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started: list[Process] = []
    for rank in range(processes):
        ranked = {**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else env
        if not afresh and possible():
            started.append(Forked(command, ranked))
        else:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen([sys.executable, *command], env=ranked, text=True, **pipes))
    return started


def start_engine(script: str, engine: str, *arguments: str, processes: int = 2) -> list[Process]:
    """A script of this folder as ranks of an engine; all but DDP must begin with ``benchmarks.cpu_engines.pretend``."""
    pretended = PRETENDED if ENGINES[engine] else {}
    if processes == 1:  # also alone in a world, as a launcher would start it
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        pretended = {**pretended, **address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [str(ROOT / "tests" / script), *arguments]
    return start(command, processes, **ENGINES[engine], **pretended, PYTHONPATH=PATHS)


def until(process: Process, line: str) -> str:
    """Reads the output up to a line that starts so; returns what was read. Fails where the process ends before."""
    assert process.stdout is not None
    read = []
    for read_line in process.stdout:
        read.append(read_line)
        if read_line.startswith(line):
            return "".join(read)
    raise AssertionError(f"ended without {line!r}:\n{''.join(read)}")


def ends(processes: Sequence[Process]) -> tuple[list[int], str]:
    """Exit codes and the rest of the output."""
    output = "".join(process.communicate(timeout=600)[0] for process in processes)
    return [process.returncode for process in processes], output


class Program:
    """``lp_train/finetune.py`` on a tiny model and text in ``folder``."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *options: str) -> None:
        self.folder, self.options = folder, options
        model, text = save_model(folder / "model", tokenizer), write_text(folder / "text.jsonl", 160)
        self.config = write_config(folder / "tiny.yaml", model, text)

    def start(self, name: str, *arguments: str, processes: int = 1, **how: Any) -> list[Process]:
        output = f"train.output_dir={self.folder / name}"
        command = [str(ROOT / "lp_train" / "finetune.py"), str(self.config), output, *self.options, *arguments]
        return start(command, processes, **how)

    def run(self, name: str, *arguments: str, processes: int = 1, **how: Any) -> Path:
        codes, output = ends(self.start(name, *arguments, processes=processes, **how))
        assert codes == [0] * processes, output
        return self.folder / name


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of each line of the metrics that has it; a last line that was cut off is left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [(line["step"], line[name]) for line in lines if name in line]


def losses(folder: Path) -> dict[int, float]:
    """By step; of a step that was made twice the later one."""
    return dict(logged(folder, "loss"))


def evaluations(folder: Path) -> dict[int, float]:
    return dict(logged(folder, "eval_kl"))


def assert_went_on(folder: Path) -> None:
    """The run did not begin anew: its first step was made once."""
    assert [step for step, _ in logged(folder, "loss")].count(1) == 1
