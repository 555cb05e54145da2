"""Lossless use: the fused model drafts, its own original checks (assisted generation; arXiv 2211.17192).

The tokens are the original's greedy ones, which is checked. Accepted length: tokens for each forward of the original.
Drafting pays where c, the draft's time over the original's, is small: at most 1 / c even if every token is accepted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arguments import integers
from benchmarks.infer import origin
from benchmarks.table import markdown
from lp_train import models
from lp_train.config import load_config
from lp_train.data import data_of
from lp_train.errors import UserError
from lp_train.pairing import PairPlan, pair_layers, unpair_layers
from lp_train.pairing.families import decoder_of
from lp_train.pairing.fuse import fuse
from lp_train.run_folder import CONFIG
from run_evaluation.answers import prompts_of


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy generation of the original, alone and with each draft: untuned pairs, and the run's recovered ones."""
    if not (options.folder / CONFIG).exists():
        raise UserError(f"{options.folder}: not the folder of a finished run; name one")
    record = models.read_stamp(models._result_folder(str(options.folder)))
    original = models.load_base(models._recorded_config(record["base"] | {"quantization": None}, None, options.dtype))
    plan = PairPlan.parse(record["pairs"], num_layers=len(decoder_of(original).layers))
    untuned = fuse(pair_layers(original, plan, record["algebra"]))
    unpair_layers(original)
    recovered, tokenizer = models.load(str(options.folder), dtype=options.dtype, full_precision=True)
    drafts = {"untuned": untuned, "recovered": fuse(recovered)}
    prompts = _prompts(options, tokenizer).to(next(original.parameters()).device)
    alone = [_generate(original, prompt[None], options.tokens) for prompt in prompts]
    found: dict[str, Any] = {**origin(prompts.device), "depth": [plan.num_layers, plan.effective_depth], "drafts": []}
    for name, draft in drafts.items():
        for length in options.lengths:
            line = {
                "draft": name,
                "length": length,
                **_assisted(original, draft, prompts, alone, length, options.tokens),
            }
            print(line, file=sys.stderr, flush=True)
            found["drafts"].append(line)
    return found


def _prompts(options: argparse.Namespace, tokenizer: Any) -> Tensor:
    config = load_config(options.folder / CONFIG, ["loss.kd_on=all", "train.seed=0"])
    data = data_of(config, tokenizer, train_tokens=config.train["max_length"])
    return prompts_of(data.eval, options.prompts, options.prompt_tokens)


def _generate(model: nn.Module, prompt: Tensor, tokens: int, **options: Any) -> tuple[Tensor, float, int]:
    """(tokens, seconds, forwards of the model)."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    hook = model.register_forward_hook(count)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )
    if prompt.is_cuda:
        torch.cuda.synchronize()
    hook.remove()
    return made, time.perf_counter() - start, forwards


def _assisted(
    original: nn.Module, draft: Any, prompts: Tensor, alone: list[tuple[Tensor, float, int]], length: int, tokens: int
) -> dict[str, Any]:
    draft.generation_config = copy.deepcopy(draft.generation_config)
    draft.generation_config.update(
        num_assistant_tokens=length, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    made = [_generate(original, prompt[None], tokens, assistant_model=draft) for prompt in prompts]
    same = [torch.equal(ours[0], theirs[0]) for ours, theirs in zip(made, alone, strict=True)]
    return {
        "accepted": tokens * len(prompts) / sum(forwards for _, _, forwards in made),
        "identical": sum(same) / len(same),
        "seconds": sum(seconds for _, seconds, _ in made),
        "speedup": sum(seconds for _, seconds, _ in alone) / sum(seconds for _, seconds, _ in made),
    }


def command(options: argparse.Namespace) -> None:
    """Prints a table and, as the last line, one JSON object."""
    found = run(options)
    rows = [
        [c["draft"], str(c["length"]), f"{c['accepted']:.2f}", f"{c['identical']:.0%}", f"{c['speedup']:.2f} x"]
        for c in found["drafts"]
    ]
    print(markdown(("draft", "drafted", "tokens per forward", "identical", "speed-up"), rows))
    print(f"\n{json.dumps(found)}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a finished run; the prompts are its held-out text"
    )
    for name, value in {"prompts": 16, "prompt-tokens": 64, "tokens": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--lengths", type=integers, default=[2, 4, 8])
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="float32")
