"""Looks at a node before a run does: one line a check, ok, warning or FAILED with the remedy.

    accelerate launch --config_file configs/accelerate/ddp.yaml --module lp_train.cluster.doctor configs/llama8b.yaml

One process on a CPU, without and with a configuration:

    python -m lp_train.cluster.doctor
    python -m lp_train.cluster.doctor configs/demo.yaml train.output_dir=/shared/runs/demo

Exit code 1 where a check FAILED. Keys are looked for, never shown. scripts/doctor_plan.py says whether a run would pay.
"""

import argparse
import contextlib
import datetime
import fcntl
import io
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from packaging.requirements import Requirement
from torch import nn

from lp_train import models, track
from lp_train.adapters import count_parameters
from lp_train.bench.memory import GIB
from lp_train.bench.scaling import memory_per_gpu
from lp_train.bench.shapes import build_on_meta
from lp_train.cluster import engine
from lp_train.cluster.launch import check_engine, leave, quieten_libraries, require_deepspeed
from lp_train.config import Config, TrackConfig, load_config
from lp_train.distill.arguments import split_of
from lp_train.distill.compiled import choose_engine
from lp_train.dry_run import plan_or_stand_in, read_model_config
from lp_train.errors import UserError, command_line, exit_code, one_line

LEVELS = ("ok", "warning", "FAILED")
PATIENCE = datetime.timedelta(seconds=120)  # for processes that do not answer
KINDS = {"FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}  # as bench.scaling names them; all others: ddp
Finding = tuple[str, str]  # one of LEVELS, and what was found


class Node(NamedTuple):
    """This process among its peers, the run's configuration and its model as shapes, and the folder that it would
    write into, or the nearest one above that exists."""

    state: PartialState
    config: Config | None
    model: nn.Module | None
    folder: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, looks, and returns the exit code: 2 for a configuration that is wrong."""
    parser = command_line("lp_train.cluster.doctor", __doc__)
    parser.add_argument("config", nargs="?", help="a YAML file; without it the checks that need none")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--plan", action="store_true", help="of lp-train: will the configuration's plan pay here?")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    failed: list[bool] = []
    return exit_code(lambda: failed.extend(run(options)), options.debug) or int(any(failed))


def run(options: argparse.Namespace) -> list[bool]:
    """Looks; whether each check FAILED."""
    if options.plan:
        raise UserError("--plan: measured by a script of its own; run lp-train doctor --plan CONFIG")
    node = this_node(options.config, options.overrides)
    failed = [look(check, node) for check in CHECKS]
    leave(node.state)
    return failed


def this_node(path: str | None, overrides: Sequence[str]) -> Node:
    """Joins the other processes; ``path``: of a configuration. Raises UserError where that is wrong."""
    require_deepspeed()
    config = load_config(path, overrides) if path else None
    model = _shapes(config) if config else None
    folder = Path(config.train["output_dir"] if config else ".").expanduser().absolute()
    folder = next(path for path in (folder, *folder.parents) if path.is_dir())
    state = PartialState(cpu=models.device().type == "cpu", timeout=PATIENCE)
    return Node(state, config, model, folder)


def look(check: Callable[[Node], Finding], node: Node) -> bool:
    """Runs one check on all processes and prints the worst of what they found; whether that is FAILED."""
    try:
        level, found = check(node)
    except (UserError, OSError, RuntimeError) as error:
        level, found = "FAILED", one_line(error)
    results: list[tuple[str, str, str]] = gather_object([(level, found, socket.gethostname())])
    rank = max(range(len(results)), key=lambda i: (LEVELS.index(results[i][0]), -i))
    level, found, host = results[rank]
    if node.state.is_main_process:
        where = f" (process {rank} on {host})" if rank else ""
        print(f"{level:<8} {check.__name__.replace('_', ' ')}: {found}{where}", flush=True)
    return level == "FAILED"


def versions(node: Node) -> Finding:
    try:
        asked = [Requirement(line) for line in requires("lp-train") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return "warning", "lp-train is not installed, so nothing says which versions it needs; run `pip install -e .`"
    found = {need.name: version(need.name) for need in asked}
    wrong = [f"{n.name} {found[n.name]}, needed {n.specifier}" for n in asked if found[n.name] not in n.specifier]
    if wrong:
        return "FAILED", f"{'; '.join(wrong)}; run `pip install -e .`"
    return "ok", ", ".join(f"{name} {number}" for name, number in found.items())


def processes(node: Node) -> Finding:
    """Adds 64 MiB up over all, twice: the first time makes the connections."""
    check_engine(node.state)
    world, rank = node.state.num_processes, node.state.process_index
    if world == 1:
        return "ok", "one, with nothing to add up; launch this as the run will be to try more"
    for _ in range(2):
        started, tensor = time.perf_counter(), torch.full((1 << 24,), float(rank), device=node.state.device)
        torch.distributed.all_reduce(tensor)
        total = float(tensor[-1])
    if total != world * (world - 1) / 2:
        return "FAILED", f"the all-reduce of the ranks of {world} gave {total:g}; look at NCCL_DEBUG=INFO, the network"
    seconds, hosts = time.perf_counter() - started, len(set(gather_object([socket.gethostname()])))
    return "ok", f"{world} on {hosts} host(s), all-reduce of 64 MiB by {node.state.backend} in {seconds:.3f} s"


def gpus(node: Node) -> Finding:
    if node.state.device.type != "cuda":
        return "warning", "none in use, this runs on the CPU; look at nvidia-smi, torch's build and ACCELERATE_USE_CPU"
    shown = torch.cuda.get_device_properties(node.state.device)
    text = f"{torch.cuda.device_count()} x {shown.name}, {shown.total_memory / GIB:.0f} GiB"
    bf16 = models.multiplies_bf16(node.state.device)
    return ("ok", text) if bf16 else ("warning", f"{text}: no bf16; set model.dtype=float16")


def shared_folder(node: Node) -> Finding:
    """A file of the first process is seen by all, and can be locked, which keeps a second run out."""
    name = [f".lp_doctor_{os.getpid()}_{time.time_ns()}"]
    broadcast_object_list(name)
    file = node.folder / name[0]
    try:
        if node.state.is_main_process:
            with file.open("w") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        node.state.wait_for_everyone()
        seen = file.exists()
        node.state.wait_for_everyone()
        if node.state.is_main_process:
            file.unlink(missing_ok=True)
    if not seen:
        return "FAILED", f"{node.folder}: not the folder of process 0; name one on a shared disk in train.output_dir"
    return "ok", f"{node.folder} is written, locked and seen by all {node.state.num_processes}"


def disk(node: Node) -> Finding:
    """Checkpoints are weights and two moments in float32: those kept, one more while it is written, and the result."""
    free, need = shutil.disk_usage(node.folder).free / GIB, 0.0
    if node.config and node.model:
        kept = (node.config.train["save_total_limit"] or 10) + 2
        trained, everything = count_parameters(node.model)
        beside = 2 * (everything - trained) if node.config.tune == "full" else 0  # those checkpoints hold all weights
        need = (12 * trained + beside) * kept / GIB
    found = f"{free:.1f} GiB free in {node.folder}, checkpoints need {need:.1f}"
    return ("ok", found) if free > need else ("FAILED", f"{found}; make room or lower train.save_total_limit")


def hub(node: Node) -> Finding:
    if node.config is None:
        return "ok", "not tried without a configuration"
    models.load_model_config(node.config.model)
    models.load_tokenizer(node.config.model)
    offline = " (HF_HUB_OFFLINE: from the cache)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return "ok", f"configuration and tokenizer of {node.config.model.name_or_path} are read{offline}"


def wandb(node: Node) -> Finding:
    config = node.config.track if node.config else TrackConfig()
    mode, why = track.choose_mode(config)
    if mode == "offline" and config.wandb != "offline":
        return ("FAILED" if config.wandb == "online" else "warning"), f"runs stay offline: {why}"
    return "ok", f"{mode}: {why}"


def available_gib(where: torch.device) -> float:
    """Of the GPU what is free, of a host's memory this process's part."""
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0] / GIB
    pages = os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def memory(node: Node) -> Finding:
    state, config, model = node.state, node.config, node.model
    if config is None or model is None:
        return "ok", "not computed without a configuration"
    rows, _ = split_of(config, state.num_processes)
    how = choose_engine(config, model, model.dtype, state.device, triton=True)
    kind = KINDS.get(engine.asked(), "ddp")
    need = sum(memory_per_gpu(model, config, kind, state.num_processes, rows, how).values())
    have = available_gib(state.device)
    text = f"{need:.1f} GiB by the estimate of --dry-run ({kind}), of {have:.1f} here"
    if need < 0.9 * have:
        return "ok", text
    remedy = "set train.gradient_checkpointing=true, a smaller train.per_device_train_batch_size, or shard by FSDP2"
    return ("warning" if need < have else "FAILED"), f"{text}; {remedy}"


CHECKS = (versions, processes, gpus, shared_folder, disk, hub, wandb, memory)


def _shapes(config: Config) -> nn.Module:
    """The paired model without memory; that its own configuration cannot be reached is told by :func:`hub`."""
    with contextlib.redirect_stdout(io.StringIO()):
        model_config = read_model_config(config.model)[0].get_text_config()
        plan = plan_or_stand_in(config, model_config.num_hidden_layers).control(config.plan.kind, config.plan.remove)
    return build_on_meta(model_config, plan, config, models.resolve_dtype(config.model.dtype))


if __name__ == "__main__":
    sys.exit(main())
