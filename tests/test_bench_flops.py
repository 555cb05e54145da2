"""The FLOP model, against the products that torch counts in a real step."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from bench_cases import Configure, configure
from family_cases import CASES, COMMON
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_masks_for_generate

from lp_train import models
from lp_train.adapters import attach
from lp_train.bench import flops
from lp_train.bench.flops import StepFlops, mean_context, peak_flops, step_flops
from lp_train.bench.shapes import checkpoint_every, suffix_blocks
from lp_train.config import Config
from lp_train.distill.losses import Head, head_loss
from lp_train.distill.replay import run_original, run_suffix
from lp_train.pairing import PairPlan, adapters_off, keep_originals, pair_layers
from lp_train.pairing.families import decoder_of

__all__ = ["configure"]

ROWS, LENGTH, TRAINED = 2, 16, 20
TOKENS = ROWS * LENGTH
PAIRS = "plan.pairs=[[1,2],[4,5]]"
LAYOUTS = [name for name in CASES if not name.startswith(("mistral", "qwen2-", "qwen3-", "smollm3-", "qwen3_moe-"))]
ANY_FAMILY = [
    ["lora.scope=suffix"],
    ["plan.algebra=par", "lora.target_modules='.*layers[.](1|4|5)[.].*'"],
    ["tune=full", "train.gradient_checkpointing=true"],
]
OPTIONS = [
    ["lora.target_modules=[q_proj]"],
    ["lora.target_modules=[v_proj]"],
    ["lora.target_modules=[o_proj]", "plan.algebra=par"],
    ["lora.target_modules=[up_proj]", "plan.algebra=par"],
    ["lora.target_modules=[q_proj,down_proj]", "train.gradient_checkpointing=true"],
    ["lora.target_modules=[k_proj]", "train.gradient_checkpointing=true"],
    ["plan.pairs=[[0,1]]", "loss.kd=0", "loss.ce=1"],
    ["plan.pairs=[[4,5]]", "loss.kd=0", "loss.hidden=1"],
    ["tune=full", "plan.algebra=par"],
    ["lora.rank_pattern={q_proj: 2, '.*2.mlp.*': 7}"],
    ["lora.lora_bias=true", "lora.target_modules='.*layers[.][45][.].*'"],
    ["plan.kind=drop"],
    ["plan.kind=drop", "plan.remove=[3,4]", "train.gradient_checkpointing=true"],
    ["plan.kind=merge", "lora.scope=suffix"],
    ["plan.kind=none", "tune=full"],
]


def build(name: str, config: Config) -> nn.Module:
    """In train mode, with attention and experts as plain products: torch counts the masked half too."""
    case = CASES[name]
    hf_config = case.config(**{**COMMON, **case.options})
    hf_config._experts_implementation = "eager"
    models._remove_dropout(hf_config)
    model, plan = (
        AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager"),
        PairPlan.parse(config.plan.pairs, 6).control(config.plan.kind, config.plan.remove),
    )
    pair_layers(model, plan, config.plan.algebra)
    if config.tune == "full":
        keep_originals(model)
    model = attach(model, plan, config).train()
    if config.train["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for block, checkpointed in suffix_blocks(plan, checkpoint_every(config)):
            for i in block:
                decoder_of(model).layers[i].gradient_checkpointing = checkpointed
    return model


class Counted(Counter[str]):
    """FLOPs by phase of a step; those of attention's products (batched ones) under ``attention`` instead."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__()
        ids = torch.randint(64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        with self.phase("original"):
            recording = run_original(model, {"input_ids": ids})
        with self.phase("frozen"), torch.no_grad(), adapters_off(model):
            run_suffix(model, recording)
        self["attention"] = self.pop("attention of original")
        with self.phase("student"):
            hidden, _ = run_suffix(model, recording)
        assert recording.final is not None
        student, teacher = hidden.flatten(0, 1)[:TRAINED], recording.final.flatten(0, 1)[:TRAINED]
        with self.phase("head"):
            labels = torch.zeros(TRAINED, dtype=torch.int64)
            total, _, _ = head_loss(student, teacher, labels, Head.of(model), config.loss)
        with self.phase("backward"):
            total.backward()
        self["attention"] += self.pop("attention of student") + self.pop("attention of backward")
        del self["attention of frozen"], self["attention of head"]

    def phase(self, name: str) -> Any:
        counted = self

        class Phase(FlopCounterMode):
            def __exit__(self, *error: Any) -> None:
                super().__exit__(*error)
                found = self.get_flop_counts()
                batched = found.get("Global", {}).get(torch.ops.aten.bmm, 0)
                # The angles of the rotary embedding: of Transformers 5.17 a product, later none; no work in either.
                angles = sum(sum(ops.values()) for module, ops in found.items() if module.endswith("rotary_emb"))
                counted[f"attention of {name}"] = batched - angles
                counted[name] = self.get_total_flops() - batched

        return Phase(display=False)

    @property
    def step(self) -> int:
        return self.total() - self["frozen"]


def model_of(config: Config, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> StepFlops:
    monkeypatch.setattr(flops, "mean_context", lambda lengths, window: float(LENGTH))
    return step_flops(model, config, [LENGTH])


def check_total(name: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, config)
    assert model_of(config, model, monkeypatch).total(TOKENS, TRAINED) == Counted(model, config).step


@pytest.mark.parametrize("options", ANY_FAMILY, ids=["suffix", "some-layers", "full-checkpointed"])
@pytest.mark.parametrize("name", LAYOUTS)  # the others differ in windows only, which are not looked at here
def test_a_step_of_every_family(
    name: str, options: list[str], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_total(name, configure(PAIRS, *options), monkeypatch)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_step_under_every_option(options: list[str], configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    check_total("llama", configure(PAIRS, *options), monkeypatch)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_of_some_blocks(
    name: str, every: int, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(PAIRS, "lora.target_modules=[o_proj]", "train.gradient_checkpointing=true")
    train = {**config.train, "gradient_checkpointing_every": every}
    check_total(name, dataclasses.replace(config, train=train), monkeypatch)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2", "qwen3_moe", "gpt_oss"])
def test_each_part_of_a_step(name: str, tune: str, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(PAIRS, f"tune={tune}")
    model = build(name, config)
    counted, parts = Counted(model, config), model_of(config, model, monkeypatch)
    assert parts.attention * TOKENS == counted["attention"]
    assert (parts.prefix + parts.teacher) * TOKENS == counted["original"]
    assert parts.teacher * TOKENS == parts.student * TOKENS == counted["frozen"]
    assert parts.head * TRAINED == counted["head"]
    assert parts.recomputed == 0
    adapters_forward = counted["student"] - counted["frozen"]
    assert (parts.input_gradients + parts.adapters) * TOKENS == counted["backward"] + adapters_forward
    if tune == "lora":  # linear in the rank, as nothing else is
        twice = configure(PAIRS, "lora.r=8")
        assert Counted(build(name, twice), twice).step - counted.step == parts.adapters * TOKENS


def test_the_prefix_is_what_lies_below_the_first_pair(configure: Configure) -> None:
    config = configure("plan.pairs=[[4,5]]")
    parts = step_flops(build("llama", config), config, [LENGTH])
    assert parts.prefix == 2 * parts.teacher == 2 * parts.student


@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_mean_context_counts_positions(window: int | None) -> None:
    lengths = [1, 7, 2, 30]
    attended = [min(i + 1, window or length) for length in lengths for i in range(length)]
    assert mean_context(lengths, window) == pytest.approx(np.mean(attended), rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3-layer-types"])
def test_mean_context_is_that_of_the_masks_of_packed_rows(name: str) -> None:
    case, lengths = CASES[name], [5, 11, 1, 7]
    hf_config = case.config(**{**COMMON, **case.options})
    hf_config._attn_implementation = "eager"
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    masks = create_masks_for_generate(
        hf_config, torch.zeros(1, sum(lengths), 32), attention_mask=None, past_key_values=None, position_ids=positions
    )
    for layer, window in enumerate(case.arch.windows):
        mask = masks[hf_config.layer_types[layer]] if isinstance(masks, dict) else masks
        assert mean_context(np.array(lengths), window) == pytest.approx(float((mask == 0).sum()) / sum(lengths))


def test_attention_follows_documents_and_windows(configure: Configure) -> None:
    config = configure(PAIRS)
    model = build("gemma2", config)
    parts = {n: step_flops(model, config, [n] * 3) for n in (1, 4, 8)}
    assert parts[4].attention == 2.5 * parts[1].attention
    # documents of 8: 4.5 positions a token in a full layer, 3.25 in one with a window of 4
    assert 3.25 * parts[1].attention < parts[8].attention < 4.5 * parts[1].attention
    assert dataclasses.replace(parts[8], attention=0.0) == dataclasses.replace(parts[1], attention=0.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
    ],
)
def test_peaks_are_those_of_the_gpu(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_no_peak_is_known_of_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None
