"""Will a configuration's plan pay on this machine? Expected speed-up, memory and training time, without its weights.

    python scripts/doctor_plan.py configs/demo.yaml      # or: lp-train doctor --plan configs/demo.yaml

Layers of the model's shape are timed for seconds; the rest is arithmetic. On several processes, where each of them
has a GPU of its own, as many train: start it like a run, by ``accelerate launch``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks import payoff
from lp_train import models
from lp_train.bench.flops import forward_costs, step_flops
from lp_train.bench.memory import GIB
from lp_train.cluster.doctor import Node, available_gib, memory, this_node
from lp_train.cluster.launch import leave, quieten_libraries
from lp_train.config import Config
from lp_train.dry_run import count_steps
from lp_train.errors import UserError, command_line, exit_code
from lp_train.pairing import plan_of

Line = tuple[str, str, str]  # what, how it is known, the figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, prints, and returns the exit code: 2 for a mistake of the user."""
    parser = command_line("doctor_plan.py", __doc__)
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    return exit_code(lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> None:
    if not options.config:
        raise UserError("--plan: needs a configuration; give a YAML file, e.g. configs/demo.yaml")
    node = this_node(options.config, options.overrides)
    show_plan(node)
    leave(node.state)


def show_plan(node: Node) -> None:
    """What the configuration's plan would bring and cost on this machine; each figure says where it comes from."""
    config, model, where = node.config, node.model, node.state.device
    assert config is not None and model is not None
    (plan, algebra), costs = plan_of(model), forward_costs(model, config.train["max_length"])
    have, rates = available_gib(where), payoff.rates(model.dtype, where)  # in this order: what it used stays taken
    need, cache = costs["paired"]["parameters"] * model.dtype.itemsize / GIB, costs["paired"]["kv_bytes_per_token"]
    verdict = "fits" if need < have else "does not fit"
    to_run = f"{need:.1f} GiB and {1000 * cache / GIB:.2f} per 1,000 cached: {verdict}, of {have:.1f} here"
    rows = [("this machine", "measured", _device(model.dtype, where, rates)), ("memory to run", "computed", to_run)]
    rows += [("memory to train", "computed", memory(node)[1])]
    saved = None
    try:
        took = payoff.decoding(model, where, have)
        saved = took.in_order - took.fused
        times = f"{1e3 * took.in_order:,.1f} ms a token in order, {1e3 * took.fused:,.1f} fused"
        text = f"{took.in_order / took.fused:.2f} x: {times} (batch 1, eager; from layers timed here)"
        rows.append(("speed-up", "predicted", text))
    except UserError as error:
        rows.append(("speed-up", "none", str(error)))
    rows += _training(config, model, rates.flops * node.state.num_processes, where, saved)
    rows.append(("accuracy", "none", "not predicted: see recipes/README.md, and what select says before training"))
    if node.state.is_main_process:
        print(f"{config.name}: {config.model.name_or_path}, {plan}, by {algebra}\n")
        print("\n".join(f"{name:<16} {how:<10} {text}" for name, how, text in rows), flush=True)


def _device(dtype: torch.dtype, where: torch.device, rates: payoff.Rates) -> str:
    what = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    slow = dtype == torch.bfloat16 and not models.multiplies_bf16(where)
    speeds = f"{rates.flops / 1e12:,.3g} TFLOP/s in products, {rates.bytes / 1e9:,.3g} GB/s in copies"
    note = "; it has no bf16 of its own, so set model.dtype=auto" if slow else ""
    if where.type == "cpu" and (load := os.getloadavg()[0]) > (os.cpu_count() or 1) + 0.5:
        note += f"; it is busy (load {load:.1f}), so all times here are too long"
    return f"{what}, {str(dtype).removeprefix('torch.')}: {speeds}{note}"


def _training(config: Config, model: nn.Module, flops: float, where: torch.device, saved: float | None) -> list[Line]:
    """Lines on the time of training at ``flops`` FLOPs per second, and on the tokens that earn it back, each with
    ``saved`` seconds (None: not measured)."""
    steps, tokens = count_steps(config, model.dtype, None), config.train["global_batch_tokens"]
    if steps is None:
        return [("training", "none", "epochs of text that was not read: give train.max_steps for an estimate")]
    work = step_flops(model, config, [config.train["max_length"]]).total(1, 1) * steps * tokens
    times = {name: work / flops / share for name, share in payoff.SHARES[where.type].items()}
    text = " to ".join(f"{spoken(took)} at {name}" for name, took in times.items())
    rows = [("training", "predicted", f"{steps:,} steps of {tokens:,} tokens: {text} of these products")]
    if saved is not None:
        back = "never here: fused steps are not faster"
        if saved > 0:
            counts = " to ".join(f"{took / saved:,.0f}" for took in times.values())
            back = f"after {counts} tokens decoded at batch 1"
        rows.append(("paid back", "predicted", back))
    return rows


def spoken(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


if __name__ == "__main__":
    sys.exit(main())
