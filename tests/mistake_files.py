"""What the mistakes in ``mistakes.py`` are made with: files, folders, hidden packages."""

import copy
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import transformers as hf
from safetensors.torch import save_file
from tiny_run import write_chats, write_lines


@dataclass(frozen=True)
class Place:
    """What a mistake is made with: shared files that stay as they are, and a folder of the test's own."""

    shared: Path  # model/, other/ (another base), text.jsonl, run/ (a finished run), config.yaml
    own: Path
    tokenizer: hf.PreTrainedTokenizerFast
    patch: pytest.MonkeyPatch

    def file(self, name: str, text: str) -> Path:
        (self.own / name).write_text(text)
        return self.own / name

    def folder(self, name: str, *files: str) -> Path:
        """A new folder with empty files."""
        (self.own / name).mkdir()
        for file in files:
            (self.own / name / file).touch()
        return self.own / name

    def hide(self, package: str) -> None:
        """As if ``package`` were not installed."""
        found = importlib.util.find_spec

        def find_spec(name: str, *arguments: Any) -> Any:
            return None if name == package else found(name, *arguments)

        self.patch.setattr(importlib.util, "find_spec", find_spec)


@dataclass(frozen=True)
class Mistake:
    """``arguments``: the command line after the configuration, ``{shared}`` and ``{own}`` being the place's folders.
    ``says``: a regular expression for each line of error. ``loads``: it can only be seen in the weights."""

    arguments: str | Callable[[Place], list[str]]
    says: str | list[str]
    loads: bool = False

    def command_line(self, place: Place) -> list[str]:
        """The arguments of ``finetune.main``; after ``CONFIG`` they name a configuration of their own."""
        if isinstance(self.arguments, str):
            given = re.split(r" (?=[\w.]+(?:=|$))", self.arguments)
        else:
            given = self.arguments(place)
        if given[0] == "CONFIG":
            return given[1:]
        given = [part.replace("{shared}", str(place.shared)).replace("{own}", str(place.own)) for part in given]
        return [str(place.shared / "config.yaml"), f"train.output_dir={place.own}/run", *given]


# --- mistakes that need a file or a folder ---------------------------------------------------------------------------


def config_text(text: str) -> Callable[[Place], list[str]]:
    return lambda place: ["CONFIG", str(place.file("bad.yaml", text))]


def model_of(make: Callable[[Place], Path]) -> Callable[[Place], list[str]]:
    return lambda place: [f"model.name_or_path={make(place)}"]


def unsupported_family(place: Place) -> Path:
    folder = place.folder("gpt2", "model.safetensors")
    hf.GPT2Config(n_layer=6).save_pretrained(folder)
    return folder


def without_pad_and_eos(place: Place) -> Path:
    tokenizer = copy.deepcopy(place.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    folder = place.folder("plain", "model.safetensors")
    hf.AutoConfig.from_pretrained(place.shared / "model").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data_file(name: str, text: str, *more: str) -> Callable[[Place], list[str]]:
    return lambda place: [f"data.train={place.file(name, text)}", *more]


def chat_without_assistant(place: Place) -> list[str]:
    rows = [{"messages": [{"role": "user", "content": f"{i} {w}"}]} for i, w in enumerate("abcdefghijkl" * 5)]
    return [f"data.train={write_lines(place.own / 'chat.jsonl', rows)}"]


def chat_without_template(place: Place) -> list[str]:
    tokenizer = copy.deepcopy(place.tokenizer)
    tokenizer.chat_template = None
    folder = place.folder("base", "model.safetensors")
    hf.AutoConfig.from_pretrained(place.shared / "model").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"model.name_or_path={folder}", f"data.train={write_chats(place.own / 'chat.jsonl')}"]


def completions_of_nothing(place: Place) -> list[str]:
    rows = [{"prompt": f"{i} {w}", "completion": ""} for i, w in enumerate("abcdefghijkl" * 5)]
    return [f"data.train={write_lines(place.own / 'pairs.jsonl', rows)}"]


def same_file_twice(place: Place) -> list[str]:
    return ["data.eval={shared}/text.jsonl"]


def output_that_is_not_empty(place: Place) -> list[str]:
    return [f"train.output_dir={place.folder('mine', 'thesis.tex')}"]


def overwrite_of_a_folder_of_mine(place: Place) -> list[str]:
    return [*output_that_is_not_empty(place), "--overwrite"]


def resumed(*overrides: str) -> Callable[[Place], list[str]]:
    def copied(place: Place) -> list[str]:
        run = tiny_run.copy_run(place.shared / "run", place.own / "again")
        return [f"train.output_dir={run}", "--resume", "train.max_steps=6", *overrides]

    return copied


def without_package(package: str, make: Callable[[Place], list[str]] | str) -> Callable[[Place], list[str]]:
    def hidden(place: Place) -> list[str]:
        place.hide(package)
        return make.split() if isinstance(make, str) else make(place)

    return hidden


def without_deepspeed(place: Place) -> list[str]:
    place.patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return without_package("deepspeed", "train.max_steps=1")(place)


def without_programs(arguments: str) -> Callable[[Place], list[str]]:
    def hidden(place: Place) -> list[str]:
        place.patch.setenv("PATH", str(place.own))
        return [arguments]

    return hidden


def full_disk(place: Place) -> list[str]:
    run = tiny_run.copy_run(place.shared / "run", place.own / "full")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    return [f"train.output_dir={run}", "--resume", "train.max_steps=6"]


def broken_weights(place: Place) -> Path:
    folder = tiny_run.copy_run(place.shared / "model", place.own / "broken")
    (folder / "model.safetensors").write_bytes(b"half a download")
    return folder


def other_weights(place: Place) -> Path:
    folder = tiny_run.copy_run(place.shared / "model", place.own / "renamed")
    weights = hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    save_file({f"x.{name}": tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def wider_config(place: Place) -> Path:
    folder = tiny_run.copy_run(place.shared / "model", place.own / "wider")
    config = hf.AutoConfig.from_pretrained(folder)
    config.intermediate_size *= 2
    config.save_pretrained(folder)
    return folder


def no_model(place: Place) -> Path:
    folder = place.folder("nothing", "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


# --- results that were copied or written by half ---------------------------------------------------------------------


def half(run: Path, file: str, kept: float | None) -> Path:
    """Leaves the first share of a file of a run; None: it is not there."""
    content = (run / file).read_bytes()
    (run / file).unlink()
    if kept is not None:
        (run / file).write_bytes(content[: int(kept * len(content))])
    return run


def half_of_run(file: str, kept: float | None) -> Callable[[Place], Path]:
    return lambda place: half(tiny_run.copy_run(place.shared / "run", place.own / "half"), f"adapter/{file}", kept)


def half_of_model(file: str) -> Callable[[Place], Path]:
    """As a run of ``tune: full`` has it."""

    def make(place: Place) -> Path:
        tiny_run.copy_run(place.shared / "model", place.own / "half" / "model")
        return half(place.own / "half", f"model/{file}", 0.5)

    return make


HALVES: dict[str, tuple[Callable[[Place], Path], str]] = {
    "no adapter_config.json": (
        half_of_run("adapter_config.json", None),
        r"/half/adapter: holds no adapter or model of a run; name a run folder, or its adapter/ or model/",
    ),
    "half an adapter_config.json": (
        half_of_run("adapter_config.json", 0.5),
        r"/half/adapter/adapter_config\.json: missing or not whole \(.* line \d+.*\); copy the result again, or make",
    ),
    "empty adapter_config.json": (
        half_of_run("adapter_config.json", 0),
        r"/half/adapter/adapter_config\.json: missing or not whole \(.* line 1 .*\); copy the result again, or make it",
    ),
    "no weights": (
        half_of_run("adapter_model.safetensors", None),
        r"/half/adapter/adapter_model\.safetensors: missing or not whole \(No such file.*\); copy the result again",
    ),
    "half the weights": (
        half_of_run("adapter_model.safetensors", 0.5),
        r"/half/adapter/adapter_model\.safetensors: missing or not whole \(.*not fully covered\); copy the result",
    ),
    "half a config.json": (
        half_of_model("config.json"),
        r"/half/model/config\.json: missing or not whole \(.* line \d+.*\); copy the result again, or make it anew",
    ),
    "half a model's weights": (
        half_of_model("model.safetensors"),
        r"/half/model/model\.safetensors: missing or not whole \(.*not fully covered\); copy the result again",
    ),
}
