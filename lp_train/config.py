"""The configuration of one run: schema, YAML, command line, all errors at once.

Three steps, each over the one before: defaults (the dataclasses here and ``trainer_options.yaml``), the YAML file, and
``key.path=value`` arguments. ``train`` and ``lora`` take the fields of TRL's SFTConfig and PEFT's LoraConfig by their
own names.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import LoraConfig
from trl import SFTConfig

from lp_train.config_check import Reader
from lp_train.config_rules import broken_rules
from lp_train.errors import UserError, one_line
from lp_train.pairing.plan import AUTO
from lp_train.trainer_options import OUR_LORA_DEFAULTS, OUR_TRAIN_DEFAULTS, OWNED_LORA, OWNED_TRAIN

MAX_PER_DEVICE = 8  # rows in one forward when the user does not say: fits the larger configs' models on 80 GB

CALIBRATION_FRACTION = 0.02  # of the training documents, where pairs are chosen and no text is given for it


@dataclass(frozen=True)
class ModelConfig:
    """Which model. ``name_or_path``: hub id, folder, or ``wheel:PACKAGE``. ``attn_implementation`` auto: sdpa (eager
    where a family's sdpa leaves something out), and in compiled training on a GPU one that skips what is masked."""

    name_or_path: str = field(metadata={"example": "meta-llama/Llama-3.2-1B"})
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str = "auto"
    quantization: Literal["nf4"] | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PlanConfig:
    """Which layers are paired (``"12:28"``, ``[[4, 5], [8, 9]]``; ``auto:8``, ``auto:loss<=0.1`` or ``auto:depth<=0.7``
    to have them chosen) and by which definition of a pair.

    ``kind``: pair, or a control of the same depth: drop or merge as many layers as there are pairs (``remove``, or the
    second of each pair), none for all layers in order. Adapters go where pairs have them, unless the layer is gone.
    """

    pairs: str | list[list[int]] = field(metadata={"example": "'12:28' or [[4, 5], [8, 9]]"})
    algebra: Literal["lp", "par"] = "lp"
    kind: Literal["pair", "drop", "merge", "none"] = "pair"
    remove: list[int] | None = None


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss. ``beta``: 0 forward KL(original || paired), 1 reverse, between generalised JSD."""

    kd: float = 1.0
    beta: float = 0.0
    temperature: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    kd_on: Literal["completion", "all"] = "completion"


@dataclass(frozen=True)
class Source:
    """One source of text: local file or glob, hub dataset, or ``builtin:pydocs``. ``name``: the hub's configuration."""

    path: str = field(metadata={"example": "builtin:pydocs"})
    weight: float | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    text_column: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training, held-out and calibration text. ``eval`` null: ``eval_fraction`` of the documents, by hash.

    Calibration text is for choosing pairs. ``calibration`` null: ``calibration_fraction`` of the training documents, by
    hash; a plan that is chosen (auto) sets it to 0.02, for any other it is 0 and all documents are trained on.
    """

    train: list[Source] = field(metadata={"example": "builtin:pydocs"})
    eval: list[Source] | None = None
    calibration: list[Source] | None = None
    truncate: bool = False
    eval_fraction: float = 0.02
    calibration_fraction: float = 0.0


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out ``tokens`` measured each time; ``prompt`` is answered by all three models at the end.

    ``tasks``: names of lm-eval's tasks and of those in ``configs/tasks``, whose files lie in ``task_data``.
    ``generation_prompts``: beginnings of held-out documents that all models continue by ``generation_tokens``.
    ``submit`` slurm: each checkpoint is measured by a job of its own (``slurm/evaluate.sbatch``).
    ``task_limit``: items of each task, a fixed sample. ``task_batch_size``: rows; null for as many as fit usually.
    """

    tokens: int = 98304
    batch_size: int = 8
    prompt: str | None = None
    max_new_tokens: int = 48
    generation_prompts: int = 64
    generation_tokens: int = 64
    tasks: list[str] = field(default_factory=list)
    task_data: str | None = None
    num_fewshot: int | None = None
    task_limit: int | None = None
    task_batch_size: int | None = None
    submit: Literal["slurm"] | None = None


@dataclass(frozen=True)
class TrackConfig:
    """Weights & Biases. ``auto``: online with a key and network, else offline; off when it is not installed."""

    wandb: Literal["auto", "off", "online", "offline"] = "auto"
    project: str = "lp-train"
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """One run. ``lora`` and ``train`` hold the libraries' own names with our defaults filled in."""

    model: ModelConfig
    plan: PlanConfig
    data: DataConfig
    name: str
    tune: Literal["lora", "full"] = "lora"
    lora: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


SECTIONS = (ModelConfig, PlanConfig, LossConfig, DataConfig, EvaluateConfig, TrackConfig)
_TRAIN_TYPES: dict[str, Any] = {  # ours, and where we allow more or less than the library
    **dict.fromkeys(("global_batch_tokens", "max_steps_float32", "max_length", "gradient_checkpointing_every"), int),
    **dict.fromkeys(("max_steps", "task_steps", "early_stopping_patience"), int | None),
    "num_train_epochs": float | None,
    "metric_for_best_model": Literal["kl", "nll"],
    **dict.fromkeys(("torch_compile", "cuda_graph"), bool | Literal["auto"]),
    "fp8": bool,
}
_LORA_TYPES = {
    "scope": Literal["paired", "suffix"],
    "start_from": str | None,
    "heal_tokens": int,
    "init_lora_weights": bool | str,  # pissa_niter_4: has its own line
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at ``path``, then ``key.path=value`` (value: YAML).

    Raises:
        UserError: the file cannot be read, or the configuration is wrong: one line for each mistake in it.
    """
    path, reader = Path(path), Reader(_all_keys())
    raw = {"name": path.stem, **_read_yaml(path)}
    if any(override.startswith("model.name_or_path=") for override in overrides) and isinstance(raw.get("model"), dict):
        raw["model"].pop("revision", None)  # it was that of the file's own model
    for override in overrides:
        try:
            _override(raw, override)
        except UserError as error:
            reader.errors.append(str(error))
    config = _read(raw, reader)
    config = _with_calibration(config)
    misread = {_key_of(line) for line in reader.errors}  # a value that was not understood breaks no further rule
    errors = reader.errors + [line for line in broken_rules(config) if _key_of(line) not in misread]
    if errors:
        raise UserError("\n".join(errors))
    return config


def _with_calibration(config: Config) -> Config:
    """Where pairs are to be chosen without text for it, a share of the training documents is kept apart."""
    data, chosen = config.data, str(config.plan.pairs).strip().startswith(AUTO)
    if not chosen or data.calibration is not None or data.calibration_fraction:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, calibration_fraction=CALIBRATION_FRACTION))


def _key_of(error: str) -> str:
    return error.partition(" ")[0].rstrip(":,")


def _read(raw: dict[str, Any], reader: Reader) -> Config:
    raw = {**raw, "data": _sources_as_lists(raw.get("data", {}))}
    defaults = {"output_dir": f"runs/{raw['name']}", **{n: d.value for n, d in OUR_TRAIN_DEFAULTS.items()}}
    given = reader.options(SFTConfig, raw.pop("train", {}), "train", _TRAIN_TYPES, OWNED_TRAIN)
    train = {**defaults, **given}
    lora = {**OUR_LORA_DEFAULTS, **reader.options(LoraConfig, raw.pop("lora", {}), "lora", _LORA_TYPES, OWNED_LORA)}
    lora.setdefault("lora_alpha", 2 * lora["r"])
    config = reader.dataclass(Config, {"model": {}, "plan": {}, **raw}, "")
    return dataclasses.replace(config, train=train, lora=lora)


def _sources_as_lists(data: Any) -> Any:
    """A source may be given as text or as a mapping, alone or in a list: all become a list of mappings."""
    if not isinstance(data, dict):
        return data
    data = dict(data)
    for role in ("train", "eval", "calibration"):
        if isinstance(data.get(role), str | dict):
            data[role] = [data[role]]
        if isinstance(data.get(role), list):
            data[role] = [{"path": s} if isinstance(s, str) else s for s in data[role]]
    return data


def _all_keys() -> list[str]:
    sections = {cls.__name__.removesuffix("Config").lower(): _names(cls) for cls in SECTIONS}
    sections["train"] = [*(n for n in _names(SFTConfig) if n not in OWNED_TRAIN), *_TRAIN_TYPES]
    sections["lora"] = [*(n for n in _names(LoraConfig) if n not in OWNED_LORA), *_LORA_TYPES]
    return [f"{section}.{name}" for section, names in sections.items() for name in names]


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars. With YAML 1.1's, ``12:28`` is 748, ``1e-3`` a text and ``off`` is false."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


_SCALARS = {
    "tag:yaml.org,2002:bool": (r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
}
_REPLACED = {*_SCALARS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        remedy = "give the path of a YAML file, e.g. configs/demo.yaml"
        raise UserError(f"config {path}: {error.strerror}; {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not YAML ({one_line(error)}); correct it there") from None
    if not isinstance(raw, dict):
        raise UserError(f"config {path}: holds {type(raw).__name__}, not a mapping; start from configs/demo.yaml")
    return raw


def _override(raw: dict[str, Any], argument: str) -> None:
    """Sets one ``key.path=value`` in place; what is missing on the way becomes a mapping."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise UserError(f"argument {argument!r}: not understood; write key.path=value, e.g. train.max_steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"argument {argument!r}: the value is not YAML ({one_line(error)}); quote it") from None
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        raw[part] = {} if raw.get(part) is None else raw[part]
        if not isinstance(raw[part], dict):
            path = ".".join(parents[: i + 1])
            raise UserError(f"argument {argument!r}: {path} is {raw[part]!r}, which has no keys; set {path} itself")
        raw = raw[part]
    raw[last] = value


def config_to_yaml(config: Config) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back to an equal one.

    It starts with a comment that lists each default of the trainer that this project changes, the library's beside.
    """
    library = {f.name: f.default for f in dataclasses.fields(SFTConfig)}
    changed = [
        f"#   {name}: {ours.value} (library: {library.get(name, 'none')}): {ours.reason}\n"
        for name, ours in OUR_TRAIN_DEFAULTS.items()
        if ours.value != library.get(name)
    ]
    body = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return "".join(["# Defaults of the trainer that this project changes:\n", *changed, "\n", body])


def batch_split(
    global_batch_tokens: int,
    max_length: int,
    num_processes: int,
    per_device: int | None = None,
    accumulation: int | None = None,
) -> tuple[int, int]:
    """(rows per device and forward, accumulation steps) with their product x processes x max_length = the global batch.

    Raises:
        UserError: no such pair, or the two given do not multiply to it.
    """
    unit = max_length * num_processes
    rows, rest = divmod(global_batch_tokens, unit)
    if rest or not rows:
        near = sorted({max(rows, 1) * unit, (rows + 1) * unit})
        rule = f"not a multiple of max_length {max_length} x {num_processes} processes"
        remedy = f"use {' or '.join(map(str, near))}"
        raise UserError(f"train.global_batch_tokens {global_batch_tokens}: {rule}; {remedy}")
    for name, value in (("per_device_train_batch_size", per_device), ("gradient_accumulation_steps", accumulation)):
        if value is not None and (value < 1 or rows % value):
            has = f"the {rows} rows that each of {num_processes} processes has in {global_batch_tokens} tokens"
            remedy = f"use one of {', '.join(map(str, _divisors(rows)))}"
            raise UserError(f"train.{name} {value}: does not divide {has}; {remedy}")
    if per_device is None:
        per_device = rows // accumulation if accumulation else max(d for d in _divisors(rows) if d <= MAX_PER_DEVICE)
    if accumulation is not None and per_device * accumulation != rows:
        given = f"train.per_device_train_batch_size {per_device} x gradient_accumulation_steps {accumulation}"
        made = f"{num_processes} processes x max_length {max_length} = {per_device * accumulation * unit} tokens"
        raise UserError(f"{given} x {made}, not global_batch_tokens {global_batch_tokens}; leave one of them out")
    return per_device, rows // per_device


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
