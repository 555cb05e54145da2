"""The configuration: three steps, all errors at once, and the batch stated in tokens."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig

from lp_train.config import Config, Source, batch_split, config_to_yaml, load_config
from lp_train.errors import UserError
from lp_train.trainer_options import OUR_TRAIN_DEFAULTS, OWNED_TRAIN

MINIMAL = """
model: {name_or_path: some/model}
plan: {pairs: "4:8"}
data: {train: builtin:pydocs}
train: {max_steps: 10}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(MINIMAL)
    return file


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).split("\n")


def test_defaults_then_yaml_then_command_line(path: Path) -> None:
    assert load_config(path).train["max_length"] == 1024
    path.write_text(MINIMAL.replace("max_steps: 10", "max_steps: 10, max_length: 512"))
    assert load_config(path).train["max_length"] == 512
    assert load_config(path, ["train.max_length=256"]).train["max_length"] == 256


def test_the_name_is_the_file_and_names_the_run_folder(path: Path) -> None:
    config = load_config(path)
    assert (config.name, config.train["output_dir"]) == ("small", "runs/small")


def test_lora_defaults(path: Path) -> None:
    lora = load_config(path, ["lora.r=8"]).lora
    expected = {
        "scope": "paired",
        "start_from": None,
        "heal_tokens": 65536,
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    }
    assert lora == expected | {"target_modules": None}
    assert load_config(path, ["lora.r=8", "lora.lora_alpha=4"]).lora["lora_alpha"] == 4


@pytest.mark.parametrize("given", ["a.txt", "{path: a.txt}", "[a.txt]", "[{path: a.txt}]"])
def test_sources_in_every_form(path: Path, given: str) -> None:
    assert load_config(path, [f"data.train={given}"]).data.train == [Source(path="a.txt")]


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.5E+2", 150.0), ("5e-3", 5e-3), (".5", 0.5), ("1", 1)])
def test_numbers_as_people_write_them(path: Path, text: str, value: float) -> None:
    assert load_config(path, [f"train.learning_rate={text}"]).train["learning_rate"] == value


def test_words_that_yaml_1_1_takes_for_something_else(path: Path) -> None:
    config = load_config(path, ["plan.pairs=12:28", "track.wandb=off", "track.name=2024-01-01"])
    assert (config.plan.pairs, config.track.wandb, config.track.name) == ("12:28", "off", "2024-01-01")


def test_an_empty_section_is_its_defaults(path: Path) -> None:
    path.write_text(MINIMAL + "evaluate:\nlora:\n")
    assert load_config(path).lora["r"] == 16


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "plan.algebr=lp": "plan.algebr: unknown key; did you mean plan.algebra?",
    "train.learning_rat=1": "train.learning_rat: unknown key; did you mean train.learning_rate?",
    "learning_rate=1": "learning_rate: unknown key; did you mean train.learning_rate?",
    "lora.rank=8": "lora.rank: unknown key; did you mean lora.",
    "zzz=1": "zzz: unknown key; allowed here:",
    "plan.pairs=12:27": "an even number of layers, this has 15; use 12:26 or 12:28",
    "plan.pairs=[[1, 2], [2, 3]]": "overlap",
    "plan=3": "plan 3: expected a mapping of pairs, algebra",
    "model.name_or_path=null": "model.name_or_path null: expected text, for example",
    "model.dtype=bf16": "model.dtype 'bf16': expected one of auto, bfloat16, float16, float32",
    "loss.kd=much": "loss.kd 'much': expected a number, for example 1.0",
    "loss.kd=true": "loss.kd True: expected a number",
    "loss.kd=-1": "a weight is 0 or more",
    "loss.kd=0": "nothing would be trained",
    "loss.beta=2": "between 0 (forward KL) and 1",
    "loss.temperature=0": "must be above 0",
    "train.max_steps=ten": "train.max_steps 'ten': expected an integer or null, for example",
    "train.max_steps=null": "give train.max_steps or train.num_train_epochs",
    "train.num_train_epochs=1": "set one of them to null",
    "train.max_length=null": "expected",
    "train.lr_scheduler_type=cosin": "expected one of cosine",
    "train.packing=true": "rows are packed and masked by lp_train.data; remove it",
    "train.bf16=true": "use model.dtype",
    "train.global_batch_tokens=1500": "not a multiple of max_length 1024; use 1024 or 2048",
    "lora.r=0": "a rank is at least 1",
    "lora.init_lora_weights=pissa_niter_4": "use true, gaussian, orthogonal or eva",
    "lora.init_lora_weights=loftq": "use true, gaussian, orthogonal or eva",
    "lora.bias=all": "use none, or lora_bias: true",
    "lora.modules_to_save=[lm_head]": "leave it out",
    "lora.layers_to_transform=[1]": "set by the program from plan.pairs and lora.scope",
    "lora.scope=all": "expected one of paired, suffix",
    "data.train=[]": "no source; give at least one",
    "data.train=[{path: a, weight: 1}, b]": "give all of them one, or none",
    "data.train=[{path: a, weight: 0}]": "a share is above 0",
    "data.train=[{weight: 1}]": "data.train.0.path: missing",
    "data.train=3": "data.train 3: expected a list",
    "data.eval_fraction=1": "a share above 0 and below 1",
    "evaluate.tokens=0": "must be at least 1",
    "track.tags=[1]": "expected a list of texts",
    "track.name.first=a": "track.name",
    "data.train.first.path=a": "data.train",
    "no-equals-sign": "write key.path=value",
    "plan.pairs=[[1,2]": "the value is not YAML",
}


@pytest.mark.parametrize("override", REFUSED)
def test_one_line_says_what_is_wrong_and_what_to_do(path: Path, override: str) -> None:
    lines = errors(path, override)
    assert len(lines) == 1
    assert REFUSED[override] in lines[0]


def test_quantised_weights_are_not_trained(path: Path) -> None:
    assert "use tune: lora" in errors(path, "tune=full", "model.quantization=nf4")[0]


def test_a_stream_has_no_epochs(path: Path) -> None:
    overrides = ["train.max_steps=null", "train.num_train_epochs=1", "data.train=[{path: a/b, streaming: true}]"]
    assert errors(path, *overrides)[0].endswith("give train.max_steps instead")


def test_all_errors_at_once(path: Path) -> None:
    lines = errors(path, "plan.algebr=lp", "loss.kd=much", "train.packing=true", "lora.r=0", "plan.pairs=12:27", "oops")
    assert len(lines) == 6


def test_what_is_required(path: Path) -> None:
    path.write_text("{}")
    missing = " ".join(errors(path))
    assert all(
        f"{key}: missing" in missing for key in ("model.name_or_path", "plan.pairs", "data.train", "train.max_steps")
    )


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- a", "not a mapping"), ("", "not a mapping")])
def test_files_that_are_no_configuration(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    assert message in errors(path)[0]


def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in errors(tmp_path / "none.yaml")[0]


# --- the resolved configuration --------------------------------------------------------------------------------------


def test_yaml_round_trip(path: Path, tmp_path: Path) -> None:
    overrides = ["track.name='1e-3'", "track.tags=[off, '12:28']", "train.learning_rate=1e-5", "data.eval=x.jsonl"]
    config = load_config(path, [*overrides, "evaluate.prompt='é: #'"])
    resolved = tmp_path / "resolved_config.yaml"
    resolved.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(resolved) == config
    yaml.safe_load(resolved.read_text(encoding="utf-8"))  # any YAML reader takes it


def test_the_head_names_every_changed_default_of_the_trainer(path: Path) -> None:
    head = config_to_yaml(load_config(path)).split("\nmodel:")[0]
    library = {name: field.default for name, field in SFTConfig.__dataclass_fields__.items()}
    for name, ours in OUR_TRAIN_DEFAULTS.items():
        changed = ours.value != library.get(name)
        assert (f"#   {name}: {ours.value} (library: {library.get(name, 'none')})" in head) == changed


def test_the_tables_name_real_options(path: Path) -> None:
    fields = set(SFTConfig.__dataclass_fields__)
    assert set(OUR_TRAIN_DEFAULTS) - fields == {
        "global_batch_tokens",
        "gradient_checkpointing_every",
        "cuda_graph",
        "fp8",
        "task_steps",
        "early_stopping_patience",
    }
    assert set(OWNED_TRAIN) & set(OUR_TRAIN_DEFAULTS) == set()


# --- the batch -------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 64), length=st.sampled_from([128, 512, 1000]), processes=st.integers(1, 8))
def test_batch_split_makes_the_stated_batch(rows: int, length: int, processes: int) -> None:
    per_device, accumulation = batch_split(rows * length * processes, length, processes)
    assert per_device * accumulation * processes * length == rows * length * processes
    assert per_device <= 8
    assert batch_split(rows * length * processes, length, processes, per_device) == (per_device, accumulation)
    assert batch_split(rows * length * processes, length, processes, None, accumulation) == (per_device, accumulation)
    assert batch_split(rows * length * processes, length, processes, rows, 1) == (rows, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3000, 1024, 1), "use 2048 or 3072"),
        ((1024, 1024, 3), "use 3072"),
        ((8192, 1024, 1, 3), "does not divide the 8 rows"),
        ((8192, 1024, 1, 0), "use one of 1, 2, 4, 8"),
        ((8192, 1024, 2, None, 8), "does not divide the 4 rows"),
        ((8192, 1024, 2, 2, 4), "= 16384 tokens, not global_batch_tokens 8192"),
    ],
)
def test_batch_split_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        batch_split(*arguments)


def test_every_config_of_the_repository_loads() -> None:
    folder = Path(__file__).resolve().parent.parent / "configs"
    configs = [load_config(path) for path in sorted(folder.glob("*.yaml"))]
    assert len(configs) >= 10
    assert all(isinstance(config, Config) and config.loss.ce == 0 for config in configs)
