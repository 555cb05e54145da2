"""Transformers' own tensor parallelism over wide layers, on gloo processes: one all-reduce after each block.

Tolerance: 1e-5 of the largest logit, float32, against one process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from family_cases import CASES, COMMON, PAIRS
from tensor_parallel_worker import IDS

from lp_train.pairing import pair_layers
from lp_train.pairing.fuse import fuse

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("llama", "llama-biases", "mistral", "qwen3")
LAYERS, FUSED = 6, 4


def model_of(name: str) -> hf.PreTrainedModel:
    """Four key and value heads, so that four ranks get one of a narrow layer each."""
    case = CASES[name]
    options = {**COMMON, **case.options, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = case.config(**options)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data = 0.5 + 0.5 * torch.randn(p.shape) if p.ndim == 1 else 0.2 * torch.randn(p.shape)
    return model.eval()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """Number of ranks, and for each checkpoint what one process finds and what the ranks found."""
    folder, expected = tmp_path_factory.mktemp("tp"), {}
    for name in FAMILIES:
        model = model_of(name)
        for form in ("sequential", "fused"):
            model = model if form == "sequential" else fuse(pair_layers(model, PAIRS))
            model.save_pretrained(folder / f"{name} {form}")
            with torch.no_grad():
                logits = model(IDS, use_cache=False).logits
            tokens = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
            expected[f"{name} {form}"] = {"logits": logits, "tokens": tokens}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    worker = [str(ROOT / "tests" / "tensor_parallel_worker.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *launch, *worker], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, {name: (one, torch.load(folder / f"{name}.pt")) for name, one in expected.items()}


@pytest.mark.parametrize("form", ["sequential", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_find_what_one_process_finds(sharded: tuple[int, dict[str, Any]], name: str, form: str) -> None:
    one, many = sharded[1][f"{name} {form}"]
    assert (many["logits"] - one["logits"]).abs().max() < 1e-5 * one["logits"].abs().max()
    assert torch.equal(many["tokens"], one["tokens"])
    assert many["rows"] * sharded[0] == (96 if form == "fused" else 48)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_needs_half_of_the_all_reduces_of_its_two_layers(sharded: tuple[int, dict[str, Any]], name: str) -> None:
    counts = {form: sharded[1][f"{name} {form}"][1]["counts"] for form in ("sequential", "fused")}
    reduces = {
        form: sum(n for op, n in found.items() if "allreduce" in op or "all_reduce" in op)
        for form, found in counts.items()
    }
    embedding = (
        reduces["fused"] - 2 * FUSED
    )  # one more where its vocabulary is sharded too (Transformers 5.23, not 5.17)
    assert embedding in (0, 1) and reduces["sequential"] == 2 * LAYERS + embedding, counts
