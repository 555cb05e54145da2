"""The start and the end of a process: engine, threads, memory, and what libraries print."""

import ctypes.util
import logging
import os
import warnings

import torch
import transformers
from accelerate import PartialState

from lp_train import models
from lp_train.cluster import engine
from lp_train.errors import UserError, require_package


def quieten_libraries() -> None:
    """Hides what libraries say about themselves; what they say about the run stays."""
    warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of a base that is no hub model
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")  # DeepSpeed, in each step
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def say(text: str) -> None:
    """Prints a line, on the first process only."""
    if PartialState().is_main_process:
        print(text, flush=True)


def start() -> PartialState:
    """Joins the processes of the launcher, each with its device, all its cores and the memory that it frees."""
    require_deepspeed()
    state = PartialState(cpu=models.device().type == "cpu")
    check_engine(state)
    use_all_cores(state)
    keep_freed_memory(state)
    return state


def check_engine(state: PartialState) -> None:
    """Refuses engines that this version does not train on, and processes that do not know of each other.

    ``LP_WORLD_SIZE`` is the size that a job script expects (``slurm/``), ``WORLD_SIZE`` what the launcher says.
    """
    job, wanted = os.environ.get("LP_WORLD_SIZE"), engine.asked()
    if job and int(job) != state.num_processes:
        rule = f"the job has as many processes, this one sees a world of {state.num_processes}"
        raise UserError(f"LP_WORLD_SIZE {job}: {rule}; look at LP_PROCESSES and at accelerate's configuration")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected != state.num_processes:
        rule = f"this process sees a world of {state.num_processes}"
        remedy = "on CPUs launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        raise UserError(f"WORLD_SIZE {expected}: {rule}; {remedy}")
    if wanted not in (*engine.WHOLE, *engine.SHARDED):
        raise UserError(f"accelerate's engine {wanted}: not supported; use one of configs/accelerate/*.yaml")
    if broken := engine.broken_options():
        raise UserError(broken)
    if wanted in engine.SHARDED and state.distributed_type.value in ("NO", "MULTI_CPU"):
        rule = "on CPUs accelerate would go on without it and say nothing; use GPUs, or configs/accelerate/ddp.yaml"
        raise UserError(f"accelerate's engine {wanted}: {rule}")


def require_deepspeed() -> None:
    """Before accelerate looks for it. Raises UserError where it is asked for and not installed."""
    if engine.uses_deepspeed():
        require_package("deepspeed", f"accelerate's engine {engine.asked()}", "run `pip install deepspeed`")


def use_all_cores(state: PartialState) -> None:
    """``accelerate launch`` sets one thread per process unless told; alone on a CPU that leaves cores idle."""
    launched, alone = "ACCELERATE_MIXED_PRECISION" in os.environ, state.num_processes == 1
    if launched and alone and state.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def keep_freed_memory(state: PartialState) -> None:
    """On a CPU with glibc a step would give the memory of its logits back and fetch it again, page by page: a quarter
    of its time."""
    libc = ctypes.util.find_library("c")
    if state.device.type == "cpu" and libc and hasattr(loaded := ctypes.CDLL(libc), "mallopt"):
        loaded.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most it takes
        loaded.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def leave(state: PartialState) -> None:
    """Ends all processes together: one that ends while its peers still talk to it aborts now and then."""
    state.wait_for_everyone()
    state.destroy_process_group()
