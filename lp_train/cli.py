"""All commands under one name, each with its own --help.

    lp-train doctor --plan configs/llama8b.yaml     # will it pay here? speed-up, memory, training time
    lp-train doctor configs/llama8b.yaml            # is this machine ready for the run?
    lp-train select configs/llama8b.yaml --greedy 8
    lp-train heal configs/llama8b.yaml              # adapters fitted in closed form
    lp-train finetune configs/demo.yaml train.max_steps=20
    lp-train evaluate runs/demo/resolved_config.yaml runs/demo
    lp-train export runs/demo runs/demo-fused
    lp-train bench infer --model runs/demo --modes eager
    lp-train report runs/demo

On several GPUs each is launched as a module:

    accelerate launch --num_processes 8 --module lp_train.cli finetune configs/llama8b.yaml
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import lp_train

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"  # beside the package in a checkout, not part of a wheel
PLAN = "--plan"
COMMANDS = {  # the module whose main() it is: of this package, or of scripts/
    "doctor": "lp_train.cluster.doctor",
    f"doctor {PLAN}": "doctor_plan",
    "select": "select_pairs",
    "heal": "heal",
    "finetune": "lp_train.finetune",
    "evaluate": "evaluate_run",
    "export": "export",
    "bench": "bench",
    "report": "report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hands the arguments after the command's name to its ``main``, and returns that one's exit code."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(f"usage: lp-train {{{','.join(name for name in COMMANDS if ' ' not in name)}}} ...\n\n{__doc__.strip()}")
        return 0
    if name == "--version":
        print(lp_train.__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        return mistake(f"{name!r}: no such command; {remedy}")
    if name == "doctor" and PLAN in rest:
        name = f"doctor {PLAN}"
        rest.remove(PLAN)
    module = COMMANDS[name]
    if not module.startswith("lp_train."):
        if not (SCRIPTS / f"{module}.py").is_file():
            rule = "runs from a checkout of the repository, this is an installed package with finetune and doctor alone"
            return mistake(f"{name}: {rule}; clone the repository and run `pip install -e .` in it")
        if str(SCRIPTS) not in sys.path:
            sys.path.insert(0, str(SCRIPTS))
    sys.argv = [f"lp-train {name}", *rest]  # what the command's help calls itself
    code: int = importlib.import_module(module).main(rest)
    return code


def mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
