"""Exported checkpoints: the same model, in Transformers' own tools. Tolerance 1e-5."""

import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import transformers as hf
from closeness import distance, error
from family_cases import CASES, PAIRS, VOCAB, WINDOW, Case
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_fuse import APART, FUSED
from test_pairs_run import saved_bytes_and_gradients
from tiny_run import write_text
from torch import Tensor, nn

import export
import lp_train
from lp_train import finetune, models
from lp_train.config import ModelConfig
from lp_train.errors import UserError
from lp_train.pairing import in_order, pair_layers
from lp_train.pairing.fuse import fuse

IDS = torch.arange(5, 45)[None]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def random_ids(tokens: int = 3 * WINDOW + 1) -> Tensor:
    return torch.randint(1, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


# --- every family ----------------------------------------------------------------------------------------------------


WITH_WIDE_LAYERS = {**FUSED, "qwen2": CASES["qwen2"]}


def written(case: Case, folder: Path, form: str, **pairing: Any) -> tuple[nn.Module, hf.PreTrainedModel]:
    """The paired model of a family and the checkpoint of it, loaded."""
    model = pair_layers(case.model(), PAIRS, **pairing)
    export._write_layers(model, folder, form, export.SHARD, print)
    options = {"dtype": torch.float32, "attn_implementation": case.attention}
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, loaded.eval()


@torch.no_grad()
@pytest.mark.parametrize("algebra", ["lp", "par"])
@pytest.mark.parametrize("name", CASES)
def test_the_paired_form_of_every_family(name: str, algebra: str, tmp_path: Path) -> None:
    model, loaded = written(CASES[name], tmp_path, "paired", algebra=algebra)
    assert loaded.config.model_type == f"layer_parallel_{model.config.model_type}"
    assert error(loaded(random_ids()).logits, model(random_ids()).logits) < 1e-5
    assert torch.equal(loaded.generate(random_ids(), **GREEDY), model.generate(random_ids(), **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_WIDE_LAYERS)
def test_the_fused_form(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, loaded = written(WITH_WIDE_LAYERS[name], tmp_path, "fused")
    assert loaded.config.num_hidden_layers == (5 if name == "qwen2" else 4)
    assert ("stays a pair: 3+4: the two layers differ in layer_types" in capsys.readouterr().out) == (name == "qwen2")
    assert error(loaded(random_ids()).logits, model(random_ids()).logits) < 1e-5
    assert torch.equal(loaded.generate(random_ids(), **GREEDY), model.generate(random_ids(), **GREEDY))
    loaded.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(random_ids()).logits, loaded(random_ids()).logits)
    assert (tmp_path / "again" / "modeling_layer_parallel.py").exists()
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (name != "llama-tied")


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@torch.no_grad()
@pytest.mark.parametrize("form", ["fused", "paired"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_in_bf16(name: str, form: str, tmp_path: Path) -> None:
    model = pair_layers(FUSED[name].model().bfloat16(), PAIRS)
    export._write_layers(model, tmp_path, form, export.SHARD, print)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dtypes(tmp_path) == {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert distance(loaded(random_ids()).logits, model(random_ids()).logits) < APART[name]


def test_a_family_without_wide_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="norms after a block; .*use --form paired"):
        written(CASES["gemma2"], tmp_path, "fused")


def test_checkpointed_pairs_save_less_and_have_the_same_gradients(tmp_path: Path) -> None:
    loaded = written(CASES["gemma3"], tmp_path, "paired")[1].train()
    saved, gradients = saved_bytes_and_gradients(loaded, random_ids(), teacher=False)
    loaded.gradient_checkpointing_enable({"use_reentrant": False})
    saved_checkpointed, checkpointed = saved_bytes_and_gradients(loaded, random_ids(), teacher=False)
    assert saved_checkpointed < 0.5 * saved
    assert all(torch.equal(a, b) for a, b in zip(gradients, checkpointed, strict=True))


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
    generation = hf.GenerationConfig.from_pretrained(model)
    generation.update(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    generation.save_pretrained(model)
    config = tiny_run.write_config(folder / "config.yaml", model, write_text(folder / "text.jsonl"))
    for name, option in (("lora", "tune=lora"), ("full", "tune=full"), ("nf4", "model.quantization=nf4")):
        if name != "nf4" or hf.utils.is_bitsandbytes_available():
            assert finetune.main([str(config), option, "model.dtype=float32", f"train.output_dir={folder / name}"]) == 0
    export.export(folder / "lora", folder / "fused")
    return folder


def restamped(run: Path, copy: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a run whose adapter says something else of itself."""
    shutil.copytree(run, copy)
    file = copy / "adapter" / "adapter_config.json"
    adapter = json.loads(file.read_text())
    change(adapter["auto_mapping"]["layer_parallel"])
    file.write_text(json.dumps(adapter))
    return copy


def same_tokenizer(ours: Any, expected: Any) -> bool:
    def told(tokenizer: Any) -> tuple[Any, ...]:
        backend = tokenizer.backend_tokenizer.to_str()
        return backend, tokenizer.special_tokens_map, tokenizer.chat_template, tokenizer.model_max_length

    return told(ours) == told(expected)


@torch.no_grad()
@pytest.mark.parametrize("run", ["lora", "full"])
def test_a_run_exported_and_loaded(run: str, shared: Path, tmp_path: Path) -> None:
    model, _ = lp_train.load(str(shared / run), dtype="float32")
    tokenizer = hf.AutoTokenizer.from_pretrained(shared / "model")
    generation = hf.GenerationConfig.from_pretrained(shared / "model")
    for form, depth in (("fused", 4), ("paired", 6)):
        export.export(shared / run, tmp_path / form, form)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / form)
        assert loaded.config.num_hidden_layers == depth
        assert loaded.generation_config.to_dict() == generation.to_dict()
        assert same_tokenizer(hf.AutoTokenizer.from_pretrained(tmp_path / form), tokenizer)
        assert error(loaded(IDS).logits, model(IDS).logits) < 1e-5
        original = json.loads((tmp_path / form / "original_config.json").read_text())
        assert (original["model_type"], original["num_hidden_layers"]) == ("llama", 6)
        card = (tmp_path / form / "README.md").read_text()
        assert "2+3, 4+5" in card and "trust_remote_code=True" in card and "| recovered" in card


@torch.no_grad()
def test_a_run_in_bf16(shared: Path, tmp_path: Path) -> None:
    run = restamped(shared / "lora", tmp_path / "run", lambda record: record["base"].update(dtype="bfloat16"))
    model, _ = lp_train.load(str(run), dtype="bfloat16")
    for form in ("fused", "paired"):
        export.export(run, tmp_path / form, form)
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / form)
        assert dtypes(tmp_path / form) == {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert distance(loaded(IDS).logits, model(IDS).logits) < APART["llama"]


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
    packed = {name: m.weight for name, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(packed) == 7 * 4
    for name, weight in packed.items():
        plain = exact.get_submodule(name).weight
        restored = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert restored.shape == plain.shape and not torch.equal(restored, plain)
        plain.data = restored
    assert error(loaded(IDS).logits, exact(IDS).logits) < 1e-3


# --- mistakes --------------------------------------------------------------------------------------------------------


def one_line(arguments: list[Path | str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert export.main([str(argument) for argument in arguments]) == 2
    bars = ("Loading weights", "Writing model shards")
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(bars)]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_mistakes_are_one_line_and_leave_nothing(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = shared / "lora", tmp_path / "out"
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "resolved_config.yaml").write_text("")
    other = restamped(run, tmp_path / "other", lambda record: record["base"].update(fingerprint="0" * 16))
    par = restamped(run, tmp_path / "par", lambda record: record.update(algebra="par"))
    assert "has not finished" in one_line([unfinished, out], capsys)
    assert "made for base" in one_line([other, out], capsys)
    assert "no such folder" in one_line([tmp_path / "nothing", out], capsys)
    assert "holds no adapter or model of a run" in one_line([shared / "model", out], capsys)
    assert "exists already" in one_line([run, shared], capsys)
    assert "2+3: algebra par: each feed-forward block" in (said := one_line([par, out], capsys))
    assert said.endswith("use --form paired")
    assert "only the form sequential" in one_line([run, out, "--merge"], capsys)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    for form in ("fused", "paired", "sequential"):
        assert "0.0 GB are free there" in one_line([run, out, "--form", form], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "par", "unfinished"]


def test_a_family_without_wide_layers_is_refused_by_the_command(
    tiny_tokenizer: hf.PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES["olmo2"].model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"), dtype="float32")
    model = get_peft_model(
        pair_layers(models.load_base(config), PAIRS), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    models.stamp(model, config)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    said = one_line([tmp_path / "adapter", tmp_path / "out"], capsys)
    assert "0+1: norms after a block; 3+4: norms after a block; use --form paired" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


WRITES = {
    "fused": "export.save_file",
    "paired": "export.save_file",
    "sequential": "transformers.modeling_utils.safe_save_file",
    "adapter": "shutil.copyfile",
}


@pytest.mark.parametrize("form", WRITES)
def test_an_export_that_breaks_off_leaves_nothing(
    form: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WRITES[form], full)
    said = one_line([shared / "lora", tmp_path / "new" / "out", "--form", form], capsys)
    assert "out: cannot be written ([Errno 28] No space left on device); nothing of it was left" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", WRITES)
def test_what_comes_to_its_place_meanwhile_is_not_replaced(
    form: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, name = WRITES[form].rpartition(".")
    write = getattr(sys.modules[module], name)

    def late(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()
        return write(*arguments, **options)

    monkeypatch.setattr(WRITES[form], late)
    said = one_line([shared / "lora", tmp_path / "out", "--form", form], capsys)
    assert said.endswith("out: exists already; name a folder that does not, or delete it")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """What export.py calls of ``HfApi``; without room it refuses the files."""

    def __init__(self, room: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.room = room

    def create_repo(self, repository: str, exist_ok: bool) -> None:
        self.calls.append(("create", repository, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: Path) -> str:
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        if not self.room:
            raise OSError("403 Forbidden\nno rights here")
        return f"https://hub/{repo_id}"


def test_push_uploads_the_exported_folder(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, out = Hub(), tmp_path / "out"
    monkeypatch.setattr(export, "HfApi", lambda: hub)
    assert export.main([str(shared / "lora"), str(out), "--form", "adapter", "--push", "me/it"]) == 0
    assert capsys.readouterr().out.endswith(f"written: {out}\nuploaded: https://hub/me/it\n")
    files = sorted(path.name for path in out.iterdir())
    assert "adapter_model.safetensors" in files
    assert hub.calls == [("create", "me/it", True), ("upload", "me/it", files)]


@pytest.mark.parametrize("reached", [True, False], ids=["refused by the hub", "offline"])
def test_a_push_that_fails_is_one_line_and_keeps_the_folder(
    reached: bool, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if reached:
        monkeypatch.setattr(export, "HfApi", lambda: Hub(room=False))
    said = one_line([shared / "lora", out, "--form", "adapter", "--push", "me/it"], capsys)
    assert said.startswith("error: --push 'me/it': " + ("403 Forbidden; " if reached else ""))
    assert said.endswith(f"{out} is complete: `hf upload me/it {out}`")
    assert (out / "adapter_model.safetensors").exists()
