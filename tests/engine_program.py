"""``lp_train/finetune.py`` as one rank of an engine that accelerate has for GPUs only, on the CPU over gloo.

accelerate is told that gloo is the backend of a GPU: then FSDP2 and DeepSpeed are what its configuration says, and the
trainer goes the way that it goes on GPUs. Whether to use it and which engine come from the environment.
"""

import sys
from importlib.util import find_spec

from accelerate import PartialState
from accelerate.utils import DistributedType


def pretend() -> None:
    if find_spec("deepspeed"):
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: None  # a minute of compiling, to be a little faster than gloo
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState(cpu=False)


if __name__ == "__main__":
    from lp_train.finetune import main

    pretend()
    sys.exit(main())
