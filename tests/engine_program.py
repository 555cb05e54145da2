"""``lp_train/finetune.py`` as one rank of an engine that accelerate has for GPUs only; the environment says which."""

import sys

from benchmarks.cpu_engines import pretend
from lp_train.finetune import main

if __name__ == "__main__":
    pretend()
    sys.exit(main())
