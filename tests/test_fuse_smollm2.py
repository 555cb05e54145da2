"""Fused SmolLM2, what random weights cannot show: real logits, perplexity, chat answers, and greedy text it drafts for.

Tolerances: logits 1e-5 of the largest one in float32; perplexity to four digits; bf16 as its test says.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from built_data import build_data
from closeness import distance
from test_smollm2 import CONFIG, LENGTH, PROMPT, ROWS, loaded, pytestmark, tokenizer  # noqa: F401  (fixtures, marks)
from torch import nn

import export
from lp_train.config import DataConfig, Source
from lp_train.pairing import pair_layers, unpair_layers
from lp_train.pairing.fuse import fuse

PAIRS = [[4, 5], [6, 7], [12, 13], [14, 15], [17, 18], [21, 22], [24, 25], [26, 27]]


@pytest.fixture(scope="module")
def both(loaded: nn.Module) -> Any:  # noqa: F811
    paired = pair_layers(loaded, PAIRS)
    yield paired, fuse(paired)
    unpair_layers(loaded)


def held_out(tokenizer: Any) -> list[torch.Tensor]:  # noqa: F811
    """Plain rows of text [1, T], without padding or packing."""
    data = build_data(
        DataConfig(train=[Source("builtin:pydocs")]),
        tokenizer,
        max_length=LENGTH,
        train_tokens=LENGTH,
        eval_tokens=ROWS * LENGTH,
        kd_on="all",
        seed=0,
    )
    return [torch.tensor(row["input_ids"])[None] for row in data.eval]


@torch.no_grad()
def nll(model: nn.Module, tokenizer: Any) -> float:  # noqa: F811
    """Nats per token of the held-out rows."""
    rows = held_out(tokenizer)
    losses = [F.cross_entropy(model(x).logits[0, :-1].float(), x[0, 1:], reduction="sum").item() for x in rows]
    return sum(losses) / sum(x.shape[1] - 1 for x in rows)


@torch.no_grad()
def test_logits_and_perplexity_are_the_paired_model_s(both: Any, tokenizer: Any) -> None:  # noqa: F811
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected, ours = (model(**inputs).logits for model in both)
    assert len(both[1].model.layers) == 22
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    paired, fused = (math.exp(nll(model, tokenizer)) for model in both)
    assert f"{fused:.4g}" == f"{paired:.4g}"


@torch.no_grad()
def test_bf16(loaded: nn.Module, tokenizer: Any) -> None:  # noqa: F811
    """Folding's rounding alone is below 1e-2 of the logits; bf16 arithmetic costs as much as it costs the pairs. On
    held-out rows: on a sentence, which of the two comes out worse is chance."""
    model = hf.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16).eval()
    model.load_state_dict(loaded.state_dict())
    exact = pair_layers(copy.deepcopy(model).float(), PAIRS)
    fused, rows = fuse(pair_layers(model, PAIRS)), held_out(tokenizer)[:2]  # bf16 is slow on a CPU without it
    models = {"exact": exact, "paired": model, "fused": fused, "rounding": copy.deepcopy(fused).float()}
    logits = {name: torch.cat([m(row).logits for row in rows], 1).float() for name, m in models.items()}
    errors = {name: distance(logits[name], logits["exact"]) for name in ("paired", "fused", "rounding")}
    errors["apart"] = distance(logits["fused"], logits["paired"])
    assert errors["rounding"] < 1e-2 and errors["fused"] < max(1e-2, 1.25 * errors["paired"]), errors
    assert errors["apart"] < 1.5e-2, errors  # found 1.40e-2, between two that are 1.16e-2 and 1.18e-2 from exact


def test_it_drafts_for_its_original_without_changing_a_token(both: Any, tokenizer: Any) -> None:  # noqa: F811
    paired, draft = both
    unpair_layers(paired)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    alone, forwards = paired.generate(**inputs, **options), []
    hook = paired.register_forward_hook(lambda *_: forwards.append(1))
    assert torch.equal(paired.generate(**inputs, **options, assistant_model=draft), alone)
    hook.remove()
    assert len(forwards) < 32
    pair_layers(paired, PAIRS)


def test_the_exported_model_chats_in_a_pipeline(both: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    export._write_layers(both[0], tmp_path, "fused", 2**28, print)
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    pipe = hf.pipeline("text-generation", model=str(tmp_path), dtype=torch.float32, device="cpu")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    answer = pipe(turns, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = both[0].generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(made, skip_special_tokens=True)
