"""What a user can get wrong, each through the program itself: one line that names the value and the remedy, exit 2.

Where the mistake can be seen without weights, loading them fails the test.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import transformers as hf
from mistake_files import HALVES, Place, broken_weights, half_of_run
from mistakes import MISTAKES
from tiny_run import write_text

import lp_train
from lp_train import finetune, models
from lp_train.errors import UserError


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    model = tiny_run.save_model(folder / "model", tiny_tokenizer)
    tiny_run.save_model(folder / "other", tiny_tokenizer, seed=1)
    text = write_text(folder / "text.jsonl")
    config = tiny_run.write_config(folder / "config.yaml", model, text)
    assert finetune.main([str(config)]) == 0
    return folder


@pytest.fixture
def place(
    shared: Path, tmp_path: Path, tiny_tokenizer: hf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Place:
    return Place(shared, tmp_path, tiny_tokenizer, monkeypatch)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was seen")

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_base", refuse)
        yield


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_exit_code_2(
    place: Place, name: str, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    mistake = MISTAKES[name]
    if not mistake.loads:
        request.getfixturevalue("no_weights")
    capfd.readouterr()
    assert finetune.main(mistake.command_line(place)) == 2
    printed = capfd.readouterr().err
    lines = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
    expected = [mistake.says] if isinstance(mistake.says, str) else mistake.says
    assert len(lines) == len(expected), printed
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), line
    assert "Traceback" not in printed


def test_debug_shows_the_traceback(place: Place) -> None:
    with pytest.raises(UserError, match="a rank is at least 1"):
        finetune.main([str(place.shared / "config.yaml"), "lora.r=0", "--debug"])


def test_a_mistake_leaves_the_folder_to_the_next_try(place: Place) -> None:
    command = [str(place.shared / "config.yaml"), f"train.output_dir={place.own}/run"]
    assert finetune.main([*command, "data.train=none.jsonl"]) == 2
    assert finetune.main([*command, "train.max_steps=1"]) == 0


@pytest.mark.parametrize(
    "mistake", ["data.train=none.jsonl", "model.name_or_path={own}/broken", "lora.target_modules=[c_attn]"]
)
def test_overwrite_deletes_nothing_before_data_and_model_are_good(place: Place, mistake: str) -> None:
    broken_weights(place)
    run = tiny_run.copy_run(place.shared / "run", place.own / "again")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = [str(place.shared / "config.yaml"), f"train.output_dir={run}", "--overwrite"]
    assert finetune.main([*command, mistake.format(own=place.own)]) == 2
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert finetune.main([*command, "train.max_steps=1", "train.eval_strategy=no"]) == 0
    assert not [path.name for path in run.iterdir() if path.name.startswith((".", "checkpoint-2"))]


def test_a_refused_resume_leaves_the_configuration(place: Place) -> None:
    run = tiny_run.copy_run(place.shared / "run", place.own / "again")
    before = (run / "resolved_config.yaml").read_text()
    command = [str(place.shared / "config.yaml"), f"train.output_dir={run}", "--resume"]
    assert finetune.main([*command, "plan.pairs=0:4"]) == 2
    assert (run / "resolved_config.yaml").read_text() == before
    assert finetune.main([*command, "train.max_steps=5"]) == 0
    assert "max_steps: 5" in (run / "resolved_config.yaml").read_text()


# --- reading a result back -------------------------------------------------------------------------------------------


def adapter_without_plan(place: Place) -> Path:
    folder = tiny_run.copy_run(place.shared / "run" / "adapter", place.own / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("layer_parallel", "something_else"))
    return folder


def unfinished(place: Place) -> Path:
    folder = place.folder("run")
    (folder / "resolved_config.yaml").write_text((place.shared / "run" / "resolved_config.yaml").read_text())
    return folder


def hub_out_of_reach(place: Place) -> tuple[str]:
    """As it is told by the hub's client without a network, in two lines."""

    def refuse(name: str) -> None:
        raise OSError("Got: ConnectError\nAn error happened, " + "please check " * 20)

    place.patch.setattr("huggingface_hub.snapshot_download", refuse)
    return ("runs/nothing",)


LOADED: dict[str, tuple[Callable[[Place], tuple[Any, ...]], str]] = {
    "nothing there": (lambda place: (place.own / "none",), r"/none'?: there is no such folder; give a run folder"),
    "hub id without network": (lambda place: ("nobody/nothing",), r"'nobody/nothing': neither a folder nor a repos"),
    "hub out of reach": (
        hub_out_of_reach,
        r"reached \(Got: ConnectError An error .{,140}\); check the name, and the net",
    ),
    "folder of something else": (
        lambda place: (place.folder("x"),),
        r"/x: holds no adapter or model of a run; name",
    ),
    "run that has not finished": (lambda place: (unfinished(place),), r"has not finished: no adapter/.*--resume"),
    "model without plan": (
        lambda place: (place.shared / "model",),
        r"/model: holds no adapter or model of a run;",
    ),
    "adapter without plan": (lambda place: (adapter_without_plan(place),), r"/adapter: holds no adapter or model"),
    "another base": (
        lambda place: (place.shared / "run", str(place.shared / "other")),
        r"made for base '.*/model' \(fingerprint \w+\), not for this base",
    ),
    "base that is not there": (
        lambda place: (place.shared / "run", str(place.own / "none")),
        r"/none'?: there is no such folder; give a folder or a hub id",
    ),
    "half a tokenizer": (
        lambda place: (half_of_run("tokenizer.json", 0.5)(place),),
        r"/half/adapter/tokenizer\.json: missing or not whole \(.* line \d+.*\); copy the result again, or make it",
    ),
}


@pytest.mark.parametrize("name", LOADED)
def test_what_cannot_be_loaded(place: Place, name: str) -> None:
    arguments, says = LOADED[name]
    with pytest.raises(UserError) as error:
        lp_train.load(*arguments(place))
    assert re.search(says, str(error.value)), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.usefixtures("no_weights")
def test_half_a_result_cannot_be_loaded(place: Place, name: str) -> None:
    make, says = HALVES[name]
    with pytest.raises(UserError, match=says):
        lp_train.load(str(make(place)))
