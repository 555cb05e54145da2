"""Engines that accelerate has for GPUs only, on CPUs over gloo: for tests and for trying a benchmark out.

accelerate is told that gloo is the backend of a GPU: FSDP2 and DeepSpeed are then what its configuration says, and the
trainer goes the way that it goes on GPUs. ``ACCELERATE_TORCH_DEVICE`` must be ``cpu``, ``ACCELERATE_USE_CPU`` not set.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def pretend() -> None:
    """Call it before anything asks accelerate for its state."""
    if importlib.util.find_spec("deepspeed"):
        of_torch: Any = importlib.import_module("deepspeed.comm.torch")
        of_torch.build_shm_op = lambda: None  # a minute of compiling, to be a little faster than gloo
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState(cpu=False)
