"""Controls at an equal longest path (``plan.kind``): layers dropped, merged, or left in order, by the same recipe."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import transformers as hf
from bench_cases import Configure, configure
from family_cases import CASES, VOCAB
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import evaluate_run
import export as export_command
import lp_train
from lp_train import finetune
from lp_train.adapters import attach
from lp_train.bench.flops import forward_costs
from lp_train.bench.memory import activation_bytes
from lp_train.bench.shapes import build_on_meta, layer_shapes, suffix_blocks
from lp_train.config import load_config
from lp_train.distill.replay import run_original, run_suffix
from lp_train.errors import UserError
from lp_train.evaluation.report import plan_section
from lp_train.evaluation.tables import draw
from lp_train.pairing import PairPlan, adapters_off, keep_originals, pair_layers, sequential, unpair_layers
from lp_train.pairing.fuse import fuse

__all__ = ["configure"]

IDS = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
PAIRS = PairPlan.parse([[1, 2], [3, 4]], num_layers=6)
DROP, MERGE, NONE = (PAIRS.control(kind) for kind in ("drop", "merge", "none"))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


def without(model: hf.PreTrainedModel, removed: list[int]) -> hf.PreTrainedModel:
    """The family's own model with fewer layers, from a copy of its weights."""
    options = {**model.config.to_dict(), "num_hidden_layers": 6 - len(removed)}
    if kinds := options.get("layer_types"):
        options["layer_types"] = [kind for i, kind in enumerate(kinds) if i not in removed]
    config = type(model.config)(**options)
    config._attn_implementation = model.config._attn_implementation
    shorter = type(model)(config).eval()
    state = model.state_dict()
    for new, old in enumerate(i for i in range(6) if i not in removed):
        for name in list(shorter.state_dict()):
            if name.startswith(f"model.layers.{new}."):
                shorter.get_parameter(name).data = state[name.replace(f"layers.{new}.", f"layers.{old}.")].clone()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        shorter.get_parameter(name).data = state[name].clone()
    return shorter


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_dropped_layer_is_as_if_it_were_not_there(family: str) -> None:
    model = CASES[family].model().eval()
    original, expected = logits(model), without(model, [2, 4])
    pair_layers(model, DROP)
    assert torch.equal(logits(model), logits(expected))
    with sequential(model):
        assert torch.equal(logits(model), original)


def test_generation_without_the_layers(tiny_llama: hf.LlamaForCausalLM) -> None:
    expected = without(tiny_llama, [2, 4])
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    pair_layers(tiny_llama, DROP)
    for cache in ("dynamic", "static"):
        found = tiny_llama.generate(IDS, cache_implementation=cache, **options)
        assert torch.equal(found, expected.generate(IDS, **options))


def test_layers_of_ones_own_choice(tiny_llama: hf.LlamaForCausalLM) -> None:
    expected = logits(without(tiny_llama, [4, 5]))
    plan = PAIRS.control("drop", [5, 4])
    assert (plan.layers, plan.first_layer, plan.effective_depth) == ((1, 2, 3), 1, 4)
    assert torch.equal(logits(pair_layers(tiny_llama, plan)), expected)


@pytest.mark.parametrize(("removed", "into"), [([2, 4], {1: [2], 3: [4]}), ([3, 4], {2: [3, 4]})])
def test_a_layer_takes_in_the_differences_of_others(
    tiny_llama: hf.LlamaForCausalLM, removed: list[int], into: dict[int, list[int]]
) -> None:
    original, expected, weights = logits(tiny_llama), without(tiny_llama, removed), tiny_llama.state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    kept = [i for i in range(6) if i not in removed]
    for k, others in into.items():
        for name, p in expected.model.layers[kept.index(k)].named_parameters():
            of = [weights[f"model.layers.{i}.{name}"] for i in (k, *others)]
            p.data = of[0] + sum(other - of[0] for other in of[1:])
    plan = PAIRS.control("merge", removed)
    assert plan.merged == into
    model = pair_layers(tiny_llama, plan)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(model), original, atol=1e-3)
    with sequential(model):
        assert torch.equal(logits(model), original)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unpair_layers(model).state_dict().items())


def test_two_layers_merged_are_the_second(tiny_llama: hf.LlamaForCausalLM) -> None:
    """w + (v - w) = v: what LaCo makes of a pair is the model without the first layer."""
    expected = logits(without(tiny_llama, [1, 3]))
    assert torch.allclose(logits(pair_layers(tiny_llama, MERGE)), expected, atol=1e-5)


def test_none_is_the_original(tiny_llama: hf.LlamaForCausalLM) -> None:
    original = logits(tiny_llama)
    assert torch.equal(logits(pair_layers(tiny_llama, NONE)), original)


@pytest.mark.parametrize("plan", [DROP, MERGE, NONE], ids=lambda plan: plan.kind)
def test_the_suffix_goes_on_from_what_they_share(tiny_llama: hf.LlamaForCausalLM, plan: PairPlan) -> None:
    model = pair_layers(tiny_llama, plan)
    with torch.no_grad():
        recording = run_original(model, {"input_ids": IDS}, keep_pair_outputs=True)
        hidden, outputs = run_suffix(model, recording)
        assert torch.equal(model.lm_head(hidden), logits(model))
        assert len(outputs) == len(recording.pair_outputs) == 2
        with sequential(model):
            assert torch.equal(model.lm_head(recording.final), logits(model))


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["paired", "suffix"])
@pytest.mark.parametrize(("plan", "layers"), [(DROP, {1, 3, 5}), (MERGE, {1, 3, 5}), (NONE, {1, 2, 3, 4, 5})])
def test_layers_that_are_gone_have_no_adapter(
    tiny_llama: hf.LlamaForCausalLM, configure: Configure, plan: PairPlan, layers: set[int], scope: str
) -> None:
    original = logits(tiny_llama)
    model = attach(pair_layers(tiny_llama, plan), plan, configure(f"lora.scope={scope}"))
    adapted = {
        int(name.split(".layers.")[1].split(".")[0]) for name, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert adapted == (layers if scope == "suffix" else layers - {5})
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    with adapters_off(model):
        untuned = logits(model)
    assert not torch.equal(logits(model), untuned)
    with sequential(model):
        assert torch.equal(logits(model), original)


def test_full_training_of_what_is_left(tiny_llama: hf.LlamaForCausalLM, configure: Configure) -> None:
    original = logits(tiny_llama)
    keep_originals(pair_layers(tiny_llama, DROP))
    model = attach(tiny_llama, DROP, configure("tune=full"))
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    moved = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"1", "3"}
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad if p.grad is not None else 0.0
    with sequential(model):
        assert torch.equal(logits(model), original)


def test_costs(tiny_llama: hf.LlamaForCausalLM, configure: Configure) -> None:
    shorter, row = without(tiny_llama, [2, 4]), 12
    counts = {"sequential": sum(p.numel() for p in tiny_llama.parameters())}
    counts["paired"] = sum(p.numel() for p in shorter.parameters())
    flops = {"sequential": counted(tiny_llama), "paired": counted(shorter)}
    model = attach(pair_layers(tiny_llama, DROP), DROP, configure())
    costs = forward_costs(model, row)
    assert costs["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, layers in (("sequential", 6), ("paired", 4)):
        assert costs[name]["parameters"] == counts[name]
        assert costs[name]["kv_bytes_per_token"] == layers * 2 * 16 * 4  # keys and values of 2 heads of 8 in float32
        causal = 4.0 * 32 * (row - (row + 1) / 2) * layers  # eager attention also multiplies what the mask hides
        assert costs[name]["flops_per_token"] == pytest.approx(flops[name] / IDS.numel() - causal)


def counted(model: nn.Module) -> int:
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        logits(model)
    # The angles of the rotary embedding: of older Transformers a product, later none; no work in either.
    angles = [ops for module, ops in counter.get_flop_counts().items() if module.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(ops.values()) for ops in angles)


def test_estimates_leave_out_what_is_gone(configure: Configure, tiny_llama: hf.LlamaForCausalLM) -> None:
    config = configure("plan.kind=drop", "plan.pairs=[[1,2],[3,4]]")
    model = build_on_meta(tiny_llama.config, DROP, config, torch.float32)
    assert [block for block, _ in suffix_blocks(DROP, 0)] == [(1,), (3,), (5,)]
    ranks = [sum(linear.rank for linear in layer.linears.values()) for layer in layer_shapes(model)]
    assert [rank > 0 for rank in ranks] == [False, True, False, True, False, False]
    assert activation_bytes(layer_shapes(model)[1], 32, 4) > activation_bytes(layer_shapes(model)[2], 32, 4)


def test_drawn() -> None:
    assert draw(plan_section(DROP, "lp")) == "─ 0── 1── × ─ 3── × ─ 5─"
    assert draw(plan_section(NONE, "lp")).count("×") == 0
    assert str(DROP) == "control drop: without layers 2 4, depth 6 -> 4"


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    model = tiny_run.save_model(folder / "model", tiny_tokenizer)
    return tiny_run.write_config(folder / "tiny.yaml", model, tiny_run.write_text(folder / "text.jsonl"))


@pytest.mark.parametrize("kind", ["drop", "merge", "none"])
def test_the_same_recipe_makes_them(config: Path, kind: str, tmp_path: Path) -> None:
    folder = config.parent / kind
    assert finetune.main([str(config), f"plan.kind={kind}", f"train.output_dir={folder}"]) == 0
    report = json.loads((folder / "report.json").read_text())
    depth = 6 if kind == "none" else 4
    assert report["plan"]["kind"] == kind and report["effective_depth"] == depth
    layers = report["cost"]["sequential"]["kv_bytes_per_token"] / 6
    assert report["cost"]["paired"]["kv_bytes_per_token"] == depth * layers
    if kind != "none":
        assert report["recovered"]["kl"] < report["paired"]["kl"]
    assert f"plan.kind: {kind}" in (folder / "adapter" / "README.md").read_text()
    model, _ = lp_train.load(str(folder))
    assert model.config.layer_parallel["kind"] == kind
    with sequential(model):
        expected = hf.AutoModelForCausalLM.from_pretrained(config.parent / "model", dtype=model.dtype)
        assert torch.equal(logits(model), logits(expected.eval()))
    assert export_command.main([str(folder), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_controls_are_measured_beside_pairs(config: Path) -> None:
    """One copy of the weights serves them all, a merge in between included."""
    folders = [config.parent / name for name in ("pairs", "merged", "pairs-again")]
    for folder, kind in zip(folders, ("pair", "merge", "pair"), strict=True):
        assert finetune.main([str(config), f"plan.kind={kind}", f"train.output_dir={folder}", "train.max_steps=2"]) == 0
    assert evaluate_run.main([str(config), *map(str, folders), "evaluate.generation_prompts=0"]) == 0
    for folder in folders:
        evaluation, report = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation", "report"))
        for model in ("sequential", "paired", "recovered"):
            assert evaluation["fidelity"][model]["kl"] == pytest.approx(report[model]["kl"], abs=1e-6)


def test_no_fused_form(tiny_llama: hf.LlamaForCausalLM) -> None:
    with pytest.raises(UserError, match="plan.kind drop: a control of training, which has no fused or paired form"):
        fuse(pair_layers(tiny_llama, DROP))


MISTAKES = {
    "unknown kind": ("plan.kind=skip", "plan.kind 'skip': expected one of pair, drop, merge, none"),
    "removed from pairs": ("plan.remove=[3,5]", r"plan.remove \[3, 5\]: plan.kind pair removes no layer; leave it out"),
    "too few": ("plan.kind=drop plan.remove=[3]", r"plan.remove \[3\]: for the depth of 2 pairs 2 different layers go"),
    "one twice": ("plan.kind=drop plan.remove=[3,3]", "2 different layers go; name as many"),
    "the first": ("plan.kind=drop plan.remove=[0,3]", "layer 0 has to stay, .*; name another"),
    "not there": (
        "plan.kind=drop plan.remove=[3,6]",
        r"plan.remove \[3, 6\]: layer 6 is out of range; the model has layers 0 to 5",
    ),
    "all weights merged": ("plan.kind=merge tune=full", "plan.kind 'merge': .*; use tune: lora"),
    "merged in 4 bits": ("plan.kind=merge model.quantization=nf4", "4-bit weights cannot be added up"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    given, message = MISTAKES[name]
    assert finetune.main([str(config), f"train.output_dir={tmp_path}/run", *given.split()]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_layers_that_cannot_be_merged() -> None:
    """Layer 1 of this mixture has a dense MLP."""
    with pytest.raises(UserError, match="plan.kind 'merge': layers 0 and 1 differ in mlp.*; use plan.kind drop"):
        pair_layers(CASES["qwen3_moe"].model(), PairPlan.parse([[0, 1]], num_layers=6).control("merge"))


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="plan.kind 'skip': unknown; use one of pair, drop, merge, none"):
        PAIRS.control("skip")


def test_the_configuration_is_read_back(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config, ["plan.kind=drop", "plan.remove=[3,5]"])
    assert (loaded.plan.kind, loaded.plan.remove) == ("drop", [3, 5])
