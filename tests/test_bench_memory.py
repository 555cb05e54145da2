"""Memory by rule, against what autograd saves."""

import dataclasses
import json
import weakref
from typing import Any

import pytest
import torch
import transformers
from bench_cases import SHAPES, Configure, configure
from family_cases import CASES, COMMON
from packaging.version import Version
from test_bench_shapes import PUBLISHED
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks.case import Case, build_config, model_config
from benchmarks.case import plan as case_plan
from lp_train.adapters import attach
from lp_train.bench.memory import COMPILED, activation_bytes, logit_bytes, memory_gib
from lp_train.bench.scaling import memory_per_gpu
from lp_train.bench.shapes import build_on_meta, layer_shapes
from lp_train.config import Config
from lp_train.distill.compiled import Engine, choose_engine
from lp_train.distill.losses import Head, head_loss
from lp_train.distill.replay import RunBlock, run_block, run_original, run_suffix
from lp_train.pairing import PairPlan, pair_layers

__all__ = ["configure"]


def saved_bytes(model: nn.Module, length: int, block: RunBlock = run_block) -> int:
    """Bytes that the student keeps for its backward, parameters left out."""
    known, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    recording = run_original(model, {"input_ids": torch.zeros(1, length, dtype=torch.int64)})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        run_suffix(model, recording, block)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("scope", ["paired", "suffix"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_activations_are_what_autograd_saves(name: str, scope: str, configure: Configure) -> None:
    case, length = CASES[name], 256
    wide = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "sliding_window": 4 * length}
    hf_config = case.config(**{**COMMON, **case.options, **wide})
    base = AutoModelForCausalLM.from_config(hf_config, attn_implementation=case.attention, dtype=torch.bfloat16)
    config, plan = configure(f"lora.scope={scope}"), PairPlan.parse([[1, 2]], 6)
    model = attach(pair_layers(base, plan), plan, config)
    saved, scores = saved_bytes(model, length), 8 * 4 * length if case.attention == "eager" else 0
    by_rule = sum(activation_bytes(layer, 256, 2) + scores for layer in layer_shapes(model)[1:])
    assert by_rule * length == pytest.approx(saved, rel=0.12)


@pytest.mark.no_cover  # counting lines doubles the time that Dynamo takes
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_compiled_block_keeps_less(name: str, configure: Configure) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64}
    hf_config = CASES[name].config(**{**COMMON, **CASES[name].options, **wide})
    base = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.bfloat16)
    plan = PairPlan.parse([[4, 5]], 6)
    model = attach(pair_layers(base, plan), plan, configure())
    split_like_inductor = torch.compile(run_block, backend="aot_eager_decomp_partition", dynamic=False)
    compiled, eager = saved_bytes(model, 512, split_like_inductor), saved_bytes(model, 512)
    # Before Transformers 5.23 Phi-3 keeps more (5.18 to 5.22 measured), which the estimate leaves aside.
    older = name == "phi3" and Version(transformers.__version__) < Version("5.23")
    assert compiled / eager == pytest.approx(0.77 if older else COMPILED, abs=0.06)


RECIPES = SHAPES.parents[1] / "recipes"
LLAMA = AutoConfig.from_pretrained(SHAPES / "Llama-3.2-1B.json")
PLAN = PairPlan.parse([[0, 1], [3, 4]], 16)


def memory(
    config: Config, rows: int = 8, dtype: torch.dtype = torch.bfloat16, shape: PretrainedConfig = LLAMA
) -> dict[str, float]:
    plan = dataclasses.replace(PLAN, num_layers=shape.num_hidden_layers)
    model = build_on_meta(shape, plan, config, dtype)
    return memory_gib(model, config, choose_engine(config, model, dtype, torch.device("cuda"), triton=True), rows)


def test_memory_items(configure: Configure) -> None:
    items = memory(configure())
    trained = 4 * 4 * (2 * 4096 + 2 * 2560 + 3 * 10240)  # float32 of rank 4 on q, o, k, v and the MLP of 4 layers
    assert items["frozen base weights"] == PUBLISHED["Llama-3.2-1B"] * 2 / 2**30
    assert items["trained weights, float32"] == items["gradients, float32"] == 4 * trained / 2**30
    assert items["AdamW states, float32"] == 8 * trained / 2**30
    assert items["logits of a chunk"] == 7 * 1024 * 128256 / 2**30


@pytest.mark.parametrize(("name", "beta"), [("forward KL", 0.0), ("reverse KL", 1.0), ("JSD(0.5)", 0.5)])
def test_logits_of_a_compiled_loss_are_those_measured(name: str, beta: float, configure: Configure) -> None:
    found = json.loads((SHAPES.parents[1] / "recipes/benchmarks/results/loss_h200.json").read_text())
    states = 2 * found["rows"] * found["width"] * 2 / 2**30  # the gradient in bf16, and that times the outer one
    measured = found["losses"][name]["ours"]["extra_gib"] - states
    assert memory(configure(f"loss.beta={beta}"))["logits of a chunk"] == pytest.approx(measured, rel=0.02)


class Peak(TorchDispatchMode):
    """The most bytes that results of operations take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ["beta=0", "beta=0.5", "beta=1", "ce=1"])
def test_logits_of_an_eager_loss_are_those_made(loss: str, dtype: torch.dtype, configure: Configure) -> None:
    config, (rows, vocab) = configure(f"loss.{loss}"), (64, 4096)
    head, student = Head(torch.randn(vocab, 8, dtype=dtype)), torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    with Peak() as peak:
        head_loss(
            student, torch.randn(rows, 8, dtype=dtype), torch.zeros(rows, dtype=torch.long), head, config.loss, rows
        )
    assert logit_bytes(config, Engine(), dtype.itemsize) == pytest.approx(peak.most / rows / vocab, rel=0.5)


def test_steps_take_on_a_gpu_what_the_rules_say() -> None:
    """Peaks of the benchmarks' compiled steps on H100s and H200s: one GPU, two and four under DDP, four under FSDP2."""
    files = (*(f"benchmarks/results/train_{gpu}.jsonl" for gpu in ("h100", "h200")), "scaling/results/h200x4.jsonl")
    lines = [json.loads(line) for file in files for line in (RECIPES / file).read_text().splitlines()]
    measured = [
        (line["case"], "ddp", 1, figures["peak_gib"])
        for line in lines
        for name, figures in line.get("variants", {}).items()
        if name == "ours"
    ]
    measured += [(line["case"], line["engine"], line["num_processes"], line["gib"]) for line in lines if "gib" in line]
    assert len(measured) >= 8
    for options, kind, gpus, gib in measured:
        case = Case(**{**options, "processes": 1})
        config, hf_config = build_config(case, case.gradient_checkpointing), model_config(case)
        config.train["fp8"] = case.fp8
        model = build_on_meta(hf_config, case_plan(case), config, torch.bfloat16)
        kind = {"FSDP2": "fsdp2"}.get(kind, "ddp")
        found = memory_per_gpu(model, config, kind, gpus, case.size[0], Engine(True, True, True, "packed"))
        assert sum(found.values()) == pytest.approx(gib, rel=0.1), options


def test_scores_are_kept_where_the_attention_of_training_has_them(configure: Configure) -> None:
    """auto is eager for Gemma 2 and gpt-oss, but in compiled training on a GPU flex attention."""
    gemma = AutoConfig.from_pretrained(SHAPES / "gemma-2-2b.json")
    activations = {
        options: memory(configure(*options), shape=gemma)["activations"]
        for options in ((), ("train.torch_compile=false",), ("model.attn_implementation=eager",))
    }
    auto, uncompiled, eager = activations.values()
    assert auto < eager < uncompiled


def test_memory_follows_the_switches(configure: Configure) -> None:
    config, plain = configure(), memory(configure())
    assert memory(config, rows=16)["activations"] == 2 * plain["activations"]
    assert memory(config, dtype=torch.float32)["frozen base weights"] == 2 * plain["frozen base weights"]
    quantised = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization="nf4"))
    assert 0.4 < memory(quantised)["frozen base weights"] / plain["frozen base weights"] < 0.5


def test_checkpointed_blocks_keep_their_input_and_one_is_run_again_at_a_time(configure: Configure) -> None:
    config = configure("train.gradient_checkpointing=true")
    every = {
        n: memory(dataclasses.replace(config, train={**config.train, "gradient_checkpointing_every": n}))["activations"]
        for n in (1, 2, 14)
    }
    plain = memory(configure())["activations"]
    assert every[1] < plain / 3
    assert every[1] < every[2] < plain
    # of 14 blocks only the first pair is checkpointed, and it is run again: its input is all that comes to the rest
    tokens, width = 8 * config.train["max_length"], LLAMA.hidden_size
    assert every[14] - plain == pytest.approx(tokens * 2 * width / 2**30)
