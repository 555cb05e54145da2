"""From the configuration to the arguments of TRL's trainer."""

from pathlib import Path

import torch
from accelerate import PartialState
from trl import SFTConfig

from lp_train.cluster import engine
from lp_train.config import Config, batch_split
from lp_train.errors import UserError
from lp_train.trainer_options import OUR_TRAIN_DEFAULTS

OURS = {"torch_compile", "max_steps_float32", *OUR_TRAIN_DEFAULTS.keys() - SFTConfig.__dataclass_fields__.keys()}


def split_of(config: Config, num_processes: int) -> tuple[int, int]:
    """(rows per device and forward, accumulation steps). Raises UserError where the global batch does not divide."""
    given = (config.train.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return batch_split(config.train["global_batch_tokens"], config.train["max_length"], num_processes, *given)


def max_steps(config: Config, dtype: torch.dtype) -> int | None:
    """Optimizer steps of a run in this dtype; None when epochs are given."""
    steps = config.train.get("max_steps")
    return config.train.get("max_steps_float32", steps) if steps and dtype == torch.float32 else steps


def training_arguments(
    config: Config, folder: Path, state: PartialState, dtype: torch.dtype, report_to: str
) -> SFTConfig:
    """``train`` with the batch split over processes, and what the program sets itself.

    Raises:
        UserError: the global batch does not divide, or the trainer or DeepSpeed refuses a value.
    """
    options = {name: value for name, value in config.train.items() if name not in OURS}
    if steps := max_steps(config, dtype):
        options["max_steps"] = steps
    if dtype == torch.float16 and engine.uses_deepspeed():
        raise UserError("model.dtype 'float16': not under DeepSpeed, where nothing scales the loss; use bfloat16")
    per_device, accumulation = split_of(config, state.num_processes)
    options.update(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        use_cpu=state.device.type == "cpu" and state.distributed_type.value in ("NO", "MULTI_CPU"),
        accelerator_config={"non_blocking": True},  # else each batch waits for the GPU to finish the one before
        bf16=dtype == torch.bfloat16 and not engine.uses_deepspeed(),  # it would cast the adapters, too
        fp16=dtype == torch.float16,
        packing=False,  # lp_train.data has packed the rows
        remove_unused_columns=False,
        report_to=report_to,
    )
    try:
        args = SFTConfig(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"train: the trainer refuses it: {' '.join(str(error).split())}") from error
    args._n_gpu = min(args.n_gpu, 1)  # a process uses one GPU; DataParallel over all that it sees would cut rows
    return args
