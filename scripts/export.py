"""Makes a checkpoint of a finished run that Transformers loads by itself.

    python scripts/export.py runs/demo runs/demo-fused
    python scripts/export.py runs/demo runs/demo-paired --form paired
    python scripts/export.py runs/demo runs/demo-in-order --form sequential --merge
    python scripts/export.py runs/demo runs/demo-adapter --form adapter --push me/demo-adapter

Forms: fused, each pair one wide layer (what cannot be fused stays a pair, and is named); paired, two layers run side
by side; sequential, the original, with --merge holding what was trained for the pairs; adapter, for PEFT.
Seconds on a CPU for a small model; ACCELERATE_USE_CPU=1 keeps a large one off the GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from accelerate import PartialState

from lp_train import models
from lp_train.cluster.launch import quieten_libraries
from lp_train.errors import command_line, exit_code
from lp_train.export import FORMS, export, push


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, writes, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = command_line("export.py", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--form", choices=FORMS, default="fused")
    parser.add_argument("--merge", action="store_true", help="sequential: with what was trained for the pairs in it")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload it to this repository of the hub")
    options = parser.parse_args(arguments)
    quieten_libraries()
    PartialState(cpu=models.device().type == "cpu")
    return exit_code(lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> None:
    export(options.run, options.out, options.form, options.merge)
    print(f"written: {options.out}")
    if options.push:
        print(f"uploaded: {push(options.out, options.push)}")


if __name__ == "__main__":
    sys.exit(main())
