"""Exported checkpoints: the same model, in Transformers' own tools, with and without lp_train. Tolerance 1e-5."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import transformers as hf
from family_cases import CASES, PAIRS, VOCAB, WINDOW
from safetensors.torch import load_file
from tiny_run import write_text
from torch import Tensor, nn

import export
import lp_train
from lp_train import finetune
from lp_train.errors import UserError
from lp_train.pairing import in_order, pair_layers
from lp_train.pairing.fuse import fuse

IDS = torch.arange(5, 45)[None]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def error(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def random_ids(tokens: int = 3 * WINDOW + 1) -> Tensor:
    return torch.randint(1, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


# --- every family ----------------------------------------------------------------------------------------------------


def written(name: str, folder: Path, form: str, **pairing: Any) -> tuple[nn.Module, hf.PreTrainedModel]:
    """The paired model of a family and the checkpoint of it, loaded."""
    model = pair_layers(CASES[name].model(), PAIRS, **pairing)
    export._write_layers(model, folder, form, export.SHARD, print)
    attention = CASES[name].attention
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model, loaded.eval()


@torch.no_grad()
@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("name", CASES)
def test_the_paired_form_of_every_family(name: str, algebra: str, tmp_path: Path) -> None:
    model, loaded = written(name, tmp_path, "paired", algebra=algebra)
    assert loaded.config.model_type == f"layer_parallel_{model.config.model_type}"
    assert error(loaded(random_ids()).logits, model(random_ids()).logits) < 1e-5
    assert torch.equal(loaded.generate(random_ids(), **GREEDY), model.generate(random_ids(), **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2", "qwen2-window-unused", "qwen3", "phi3"])
def test_the_fused_form(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, loaded = written(name, tmp_path, "fused")
    assert loaded.config.num_hidden_layers == (5 if name == "qwen2" else 4)
    assert ("stays a pair: 3+4: the two layers differ in layer_types" in capsys.readouterr().out) == (name == "qwen2")
    assert error(loaded(random_ids()).logits, model(random_ids()).logits) < 1e-5
    assert torch.equal(loaded.generate(random_ids(), **GREEDY), model.generate(random_ids(), **GREEDY))
    loaded.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(random_ids()).logits, loaded(random_ids()).logits)
    assert (tmp_path / "again" / "modeling_layer_parallel.py").exists()


def test_a_family_without_wide_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="norms after a block; .*use --form paired"):
        written("gemma2", tmp_path, "fused")


def test_checkpointed_pairs_have_the_same_gradients(tmp_path: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        loaded = written("gemma3", tmp_path, "paired")[1].train()
        if checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
        loaded(random_ids(), labels=random_ids(), use_cache=False).loss.backward()
        grads.append([p.grad for p in loaded.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_shards_hold_no_more_than_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    save = export.save_file

    def saving(tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        save(tensors, *arguments, **options)

    monkeypatch.setattr(export, "save_file", saving)
    monkeypatch.setattr(export, "SHARD", 20_000)
    model, loaded = written("qwen3", tmp_path, "fused")
    assert len(sizes) > 3 and max(sizes) <= 20_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(4 * p.numel() for p in loaded.parameters())
    for file in set(index["weight_map"].values()):
        assert set(load_file(tmp_path / file)) == {n for n, where in index["weight_map"].items() if where == file}
    assert error(loaded(random_ids()).logits, model(random_ids()).logits) < 1e-5


@pytest.mark.parametrize("scaling", ["longrope"])
def test_phi3_with_two_rotary_tables(scaling: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    rope = {"rope_type": scaling, "rope_theta": 100.0, "original_max_position_embeddings": 8, **factors}
    options = {**CASES["phi3"].options, "rope_parameters": rope, "original_max_position_embeddings": 8}
    case = CASES["phi3"].__class__(CASES["phi3"].config, options, CASES["phi3"].arch)
    model = pair_layers(case.model(), PAIRS)
    export._write_layers(model, tmp_path, "fused", export.SHARD, print)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for tokens in (5, 13):
        assert error(loaded(random_ids(tokens)).logits, model(random_ids(tokens)).logits) < 1e-5


# --- finished runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    """Runs ``lora``, ``full`` and ``nf4``, and the fused export of the first."""
    folder = tmp_path_factory.mktemp("export")
    model = tiny_run.save_model(folder / "model", tiny_tokenizer)
    config = tiny_run.write_config(folder / "config.yaml", model, write_text(folder / "text.jsonl"))
    for name, option in (("lora", "tune=lora"), ("full", "tune=full"), ("nf4", "model.quantization=nf4")):
        if name != "nf4" or hf.utils.is_bitsandbytes_available():
            assert finetune.main([str(config), option, "model.dtype=float32", f"train.output_dir={folder / name}"]) == 0
    export.export(folder / "lora", folder / "fused")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("run", ["lora", "full"])
def test_a_run_exported_and_loaded(run: str, shared: Path, tmp_path: Path) -> None:
    model, tokenizer = lp_train.load(str(shared / run), dtype="float32")
    for form, depth in (("fused", 4), ("paired", 6)):
        export.export(shared / run, tmp_path / form, form)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / form)
        assert loaded.config.num_hidden_layers == depth
        assert loaded.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
        assert error(loaded(IDS).logits, model(IDS).logits) < 1e-5
        original = json.loads((tmp_path / form / "original_config.json").read_text())
        assert (original["model_type"], original["num_hidden_layers"]) == ("llama", 6)
        card = (tmp_path / form / "README.md").read_text()
        assert "2+3, 4+5" in card and "trust_remote_code=True" in card and "| recovered" in card


@torch.no_grad()
@pytest.mark.parametrize("run", ["lora", "full"])
def test_the_sequential_form_is_the_original_or_holds_the_adapters(run: str, shared: Path, tmp_path: Path) -> None:
    model, _ = lp_train.load(str(shared / run), dtype="float32")
    export.export(shared / run, tmp_path / "plain", "sequential")
    nll = export.export(shared / run, tmp_path / "merged", "sequential", merge=True)
    base = hf.AutoModelForCausalLM.from_pretrained(shared / "model")
    plain, merged = (hf.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "merged"))
    assert type(plain) is type(merged) is hf.LlamaForCausalLM
    assert torch.equal(plain(IDS).logits, base(IDS).logits)
    with in_order(model):
        assert error(merged(IDS).logits, model(IDS).logits) < 1e-5
    assert f"merged, in order: {nll['merged, in order']:.4f}" in (tmp_path / "merged" / "README.md").read_text()


def test_the_adapter_form_is_the_adapter(shared: Path, tmp_path: Path) -> None:
    export.export(shared / "lora", tmp_path / "adapter", "adapter")
    assert lp_train.load(str(tmp_path / "adapter"))[0].peft_config
    with pytest.raises(UserError, match="no adapter; use fused"):
        export.export(shared / "full", tmp_path / "none", "adapter")


@torch.no_grad()
def test_from_four_bits_into_the_full_base(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    nll = export.export(shared / "nf4", tmp_path / "fused")
    assert 0 < abs(nll["trained in 4 bits"] - nll["full precision"]) < 0.5
    assert f"{nll['full precision']:.4f} in full precision" in capsys.readouterr().out
    model, _ = lp_train.load(str(shared / "nf4"), dtype="float32", full_precision=True)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert error(loaded(IDS).logits, model(IDS).logits) < 1e-5


def test_pipeline_and_chat_template(shared: Path) -> None:
    pipe = hf.pipeline("text-generation", model=str(shared / "fused"), device="cpu")
    answer = pipe([{"role": "user", "content": "What is the capital of France?"}], **GREEDY)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


@torch.no_grad()
def test_bitsandbytes_quantises_wide_layers(tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_run.save_model(tmp_path / "m", tiny_tokenizer, hidden_size=64)  # in rows of 32 its CPU kernel is wrong
    fuse(pair_layers(hf.AutoModelForCausalLM.from_pretrained(model), "2:6")).save_pretrained(tmp_path / "fused")
    exact = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    four = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "fused", quantization_config=four)
    packed, weight = (m.model.layers[2].mlp.up_proj.weight for m in (loaded, exact))
    restored = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    assert restored.shape == weight.shape == (128, 64)
    assert error(restored, weight) < 0.2  # half of nf4's largest step
    assert loaded(IDS).logits.isfinite().all()


# --- without lp_train ------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust})
assert not any(name.startswith("lp_train") for name in sys.modules)
torch.save(model(torch.arange(5, 45)[None]).logits, sys.argv[2])
model.save_pretrained(sys.argv[2] + "-saved")
"""


def run_alone(shared: Path, tmp_path: Path, trust: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [sys.executable, "-c", LOAD.format(trust=trust), str(shared / "fused"), str(tmp_path / "logits")]
    return subprocess.run(
        arguments, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@torch.no_grad()
def test_it_loads_through_its_own_file_without_lp_train(shared: Path, tmp_path: Path) -> None:
    done = run_alone(shared, tmp_path, "True")
    assert done.returncode == 0, done.stderr
    expected = lp_train.load(str(shared / "lora"), dtype="float32")[0](IDS).logits
    assert error(torch.load(tmp_path / "logits"), expected) < 1e-5
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "logits-saved")
    assert error(again(IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("trust", ["None", "False"])
def test_without_lp_train_and_without_trust_it_does_not_load(trust: str, shared: Path, tmp_path: Path) -> None:
    done = run_alone(shared, tmp_path, trust)
    assert done.returncode != 0 and not (tmp_path / "logits").exists()
    assert "trust_remote_code" in done.stderr


def test_a_plain_class_of_the_family_refuses_the_checkpoint_or_its_weights(shared: Path) -> None:
    with pytest.raises(Exception, match="is a per-layer attribute"):
        hf.LlamaForCausalLM.from_pretrained(shared / "fused")


# --- mistakes --------------------------------------------------------------------------------------------------------


def one_line(arguments: list[Path | str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert export.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_mistakes_are_one_line_and_leave_nothing(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = shared / "lora", tmp_path / "out"
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    unfinished.mkdir()
    (unfinished / "resolved_config.yaml").write_text("")
    shutil.copytree(run, other)
    file = other / "adapter" / "adapter_config.json"
    adapter = json.loads(file.read_text())
    adapter["auto_mapping"]["layer_parallel"]["base"]["fingerprint"] = "0" * 16
    file.write_text(json.dumps(adapter))
    assert "has not finished" in one_line([unfinished, out], capsys)
    assert "made for base" in one_line([other, out], capsys)
    assert "no such folder" in one_line([tmp_path / "nothing", out], capsys)
    assert "was not written by lp_train" in one_line([shared / "model", out], capsys)
    assert "exists already" in one_line([run, shared], capsys)
    assert "only the form sequential" in one_line([run, out, "--merge"], capsys)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    assert "0.0 GB are free there" in one_line([run, out], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "unfinished"]


def test_an_export_that_breaks_off_leaves_nothing(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        export.export(shared / "lora", tmp_path / "out")
    assert not list(tmp_path.iterdir())
