"""What 4 bits cost a model that was dequantised from blocks of 32: its tasks with a second rounding error of that size.

    PYTHONPATH=.:scripts python -m benchmarks.quantization configs/smollm2_135m.yaml --seeds 2 \\
        "evaluate.tasks=[seven]" evaluate.num_fewshot=0 evaluate.task_data=DIR

A weight that was rounded to one of its block's 16 levels is off by up to half a level, evenly. For small errors the
expected loss grows with their variance, so that an independent second error of the same size costs about what the
first one did.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from benchmarks.infer import origin
from benchmarks.table import markdown
from lp_train import models
from lp_train.cluster.launch import quieten_libraries
from lp_train.config import load_config
from lp_train.errors import UserError, command_line, exit_code
from lp_train.evaluation.fidelity import as_it_is
from lp_train.evaluation.tasks import load_suite
from lp_train.pairing.families import decoder_of

BLOCK, LEVELS = 32, 16


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Each task's figure of the model as it is, and under each seed's error."""
    config = load_config(options.config, options.overrides)
    state = PartialState(cpu=models.device().type == "cpu")
    if not (suite := load_suite(config.evaluate)).tasks:
        raise UserError("evaluate.tasks []: nothing to run; name tasks or groups")
    tokenizer = models.load_tokenizer(config.model)
    model = models.load_base(config.model, state.device)
    dtype = models.resolve_dtype(config.model.dtype, state.device)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    found: dict[str, Any] = {**origin(state.device), "figures": []}
    for seed in (None, *range(options.seeds)):
        model.load_state_dict(whole, strict=False)
        if seed is not None:
            add_rounding_error(model, seed)
        items = suite.run(model, tokenizer, {"model": as_it_is}, dtype, state, config.evaluate.task_batch_size)[0][
            "model"
        ]
        figures = {task: built.figures(items[task])[built.primary] for task, built in suite.tasks.items()}
        print(seed, figures, file=sys.stderr, flush=True)
        found["figures"].append({"seed": seed, **figures})
    return found


@torch.no_grad()
def add_rounding_error(model: nn.Module, seed: int) -> None:
    """To each linear layer of the decoder's layers, which are what the 4-bit file holds in 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    for layer in decoder_of(model).layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight += rounding_error(module.weight, generator).to(module.weight)


def rounding_error(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Even in half a level of each block on both sides. A block's ends are levels, so a level is its range / 15.

    Args:
        weight: [out, in]; blocks are 32 consecutive inputs, as in GGUF's Q4_1.
    """
    blocks = weight.float().cpu().unflatten(1, (-1, BLOCK))
    level = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (LEVELS - 1)
    return ((torch.rand(blocks.shape, generator=generator) - 0.5) * level).flatten(1)


def table(found: dict[str, Any]) -> str:
    plain, *noisy = found["figures"]
    rows = []
    for task in [name for name in plain if name != "seed"]:
        seeds = [line[task] for line in noisy]
        mean = sum(seeds) / len(seeds)
        rows.append([task, f"{plain[task]:.4f}", *(f"{value:.4f}" for value in seeds), f"{mean - plain[task]:+.4f}"])
    return markdown(["task", "as it is", *(f"seed {line['seed']}" for line in noisy), "mean difference"], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line("benchmarks.quantization", __doc__, "evaluate.tasks=[seven]")
    parser.add_argument("--seeds", type=int, choices=range(1, 10), metavar="N", default=2, help="default %(default)s")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()

    def command() -> None:
        found = run(options)
        print(f"{table(found)}\n\n{json.dumps(found)}")

    return exit_code(command, options.debug)


if __name__ == "__main__":
    sys.exit(main())
