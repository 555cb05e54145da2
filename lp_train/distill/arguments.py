"""From the configuration to the arguments of TRL's trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from trl import SFTConfig

from lp_train.config import Config, batch_split
from lp_train.errors import UserError
from lp_train.trainer_options import OUR_TRAIN_DEFAULTS


def training_arguments(
    config: Config, folder: Path, state: PartialState, dtype: torch.dtype, report_to: str
) -> SFTConfig:
    """``train`` with the batch split over processes, and what the program sets itself.

    Raises:
        UserError: the global batch does not divide, or the trainer refuses a value.
    """
    options = dict(config.train)
    tokens, length = options.pop("global_batch_tokens"), options["max_length"]
    for name in ("torch_compile", *(name for name in OUR_TRAIN_DEFAULTS if name not in SFTConfig.__dataclass_fields__)):
        options.pop(name, None)  # ours
    slow_steps = options.pop("max_steps_float32", None)
    if slow_steps and "max_steps" in options and dtype == torch.float32:
        options["max_steps"] = slow_steps
    per_device, accumulation = batch_split(
        tokens,
        length,
        state.num_processes,
        options.pop("per_device_train_batch_size", None),
        options.pop("gradient_accumulation_steps", None),
    )
    options.update(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        use_cpu=state.device.type == "cpu",
        accelerator_config={"non_blocking": True},  # else each batch waits for the GPU to finish the one before
        bf16=dtype == torch.bfloat16,
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
