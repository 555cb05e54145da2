"""The engine that accelerate's configuration asks for, and the one that runs."""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lp_train.errors import UserError

WHOLE = ("NO", "DDP")  # every process holds everything: one process, or data parallelism
IN_PARTS = ("FSDP2", "ZeRO-3")  # every process holds a part of the weights
SHARDED = (*IN_PARTS, "ZeRO-2")  # or of the optimizer at least
FSDP_NEEDS = {  # option: the value that it must have, what it is when not given, why
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "any number of processes must be able to resume"),
    "cpu_ram_efficient_loading": ("false", "false", "every process looks at the weights before they are cut"),
    "activation_checkpointing": ("false", "false", "use train.gradient_checkpointing"),
    "offload_params": ("false", "false", "the loss needs the head on the GPU"),
}


def asked() -> str:
    """By the variables that ``accelerate launch`` sets from its configuration."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return f"ZeRO-{_zero_stage()}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP" if "LOCAL_RANK" in os.environ else "NO"


def uses_deepspeed() -> bool:
    return asked().startswith("ZeRO")


def broken_options() -> str | None:
    """A line on the first option of FSDP in accelerate's configuration that does not go with this program."""
    for name, (needed, default, reason) in FSDP_NEEDS.items() if asked() == "FSDP2" else ():
        value = os.environ.get(f"FSDP_{name.upper()}", default)
        if value != needed:
            return f"fsdp_{name} {value}: {reason}; set it to {needed} in accelerate's configuration"
    return None


def fit_deepspeed(config: dict[str, Any]) -> None:
    """What DeepSpeed's configuration needs here, where it is not said otherwise."""
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    zero = config["zero_optimization"]
    zero.setdefault("reduce_bucket_size", 50_000_000)  # elements: adapters are small, the default is a buffer of 2 GB
    if zero["stage"] == 3:  # small weights would stay whole, and be gathered in the dtype of the first of them
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}


def load_whole() -> None:
    """Transformers would load weights in parts under ZeRO-3, without what then puts them together in a forward."""
    unset_hf_deepspeed_config()


def _zero_stage() -> int:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return int(json.loads(Path(file).read_text())["zero_optimization"]["stage"])
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def seen(prepared: nn.Module) -> str:
    """Of the model as accelerate returned it."""
    if isinstance(prepared, FSDPModule):
        return "FSDP2"
    if isinstance(prepared, DistributedDataParallel):
        return "DDP"
    stage = getattr(prepared, "zero_optimization_stage", None)
    return f"ZeRO-{int(stage())}" if stage else "NO"


def look(prepared: nn.Module, ours: int, everything: int) -> dict[str, Any]:
    """What runs: the engine, processes, backend, and which share of all parameters this process holds (``ours`` of
    ``everything`` elements).

    Raises:
        UserError: it is not what accelerate's configuration asks for.
    """
    ready, share = dist.is_initialized(), ours / everything
    world, backend = (dist.get_world_size(), dist.get_backend()) if ready else (1, None)
    usual = "nccl" if any(p.is_cuda for p in prepared.parameters()) else "gloo"
    found = {"engine": seen(prepared), "num_processes": world, "backend": backend, "share_held": share}
    wanted = {"engine": asked(), "num_processes": int(os.environ.get("WORLD_SIZE", "1"))}
    wanted["backend"] = usual if backend and usual not in backend else backend
    if (differing := next((name for name in wanted if wanted[name] != found[name]), None)) is not None:
        rule = f"asked for, but {found[differing]} runs; launch with one of configs/accelerate/*.yaml"
        raise UserError(f"accelerate's {differing} {wanted[differing]}: {rule}")
    if asked() in IN_PARTS and world > 1 and share > 1.5 / world:
        rule = f"each of {world} processes should hold a part of the weights, this one holds {share:.0%}"
        raise UserError(f"accelerate's engine {asked()}: {rule}; launch with one of configs/accelerate/*.yaml")
    return found
