"""``lp-train``: every command by its name, help that can be copied, and what an installed wheel can do."""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lp_train
from lp_train import cli
from lp_train.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lp-train"])
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_its_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"    lp-train {name} " in shown for name in cli.COMMANDS)


class Understood(Exception):
    """A command has read its arguments, and would begin."""


@pytest.mark.parametrize("command", re.findall(r"^    lp-train ([^#\n]+)", cli.__doc__ or "", flags=re.MULTILINE))
def test_every_example_of_its_help_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser
    for name in ("parse_args", "parse_intermixed_args"):
        read = getattr(parser, name.replace("parse_", "parse_known_"))

        def parse(self: argparse.ArgumentParser, arguments: list[str], read: Any = read) -> None:
            _, unknown = read(self, arguments)
            assert not unknown
            raise Understood

        monkeypatch.setattr(parser, name, parse)
    with pytest.raises(Understood):
        cli.main(command.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_has_examples_in_its_own_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: lp-train {name} ") and f"\n    lp-train {name} " in shown and "--debug" in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_gets_its_arguments_and_gives_its_exit_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(cli.COMMANDS[name])
    monkeypatch.setattr(module, "main", lambda arguments: 85 if arguments == ["a", "--b"] else 1)
    assert cli.main([name, "a", "--b"]) == 85


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["finetun"], "'finetun': no such command; did you mean finetune?"),
        (["zzz"], f"'zzz': no such command; use one of {', '.join(cli.COMMANDS)}"),
        (["report", "none"], "none: "),
        (["bench", "predict", "none.jsonl"], "none.jsonl: not the file that infer --out wrote"),
        (["doctor", "none.yaml"], "none.yaml"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and says in shown and shown.count("\n") == 1


@pytest.mark.parametrize("arguments", [["bench", "predict", "none.jsonl"], ["report", "none"], ["doctor", "none.yaml"]])
def test_debug_shows_the_traceback_of_a_mistake(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        cli.main([*arguments, "--debug"])


def test_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{lp_train.__version__}\n"


@pytest.mark.slow
def test_an_installed_wheel_has_the_library_and_says_what_it_has_not(tmp_path: Path) -> None:
    """Built from a copy, installed into a folder, run from another one: nothing of the checkout is in reach."""
    pytest.importorskip("setuptools")
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    shutil.copytree(ROOT / "lp_train", source / "lp_train", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    wheel = next(tmp_path.glob("lp_train-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    elsewhere.mkdir()

    def run(*arguments: str) -> tuple[int, str]:
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, site / "bin" / "lp-train", *arguments]
        ended = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        return ended.returncode, ended.stdout + ended.stderr

    assert run("--version") == (0, f"{lp_train.__version__}\n")
    assert run("finetune", "--help")[0] == 0
    assert run("finetune", "none.yaml")[0] == 2
    code, shown = run("export", "--help")  # the others as below, where scripts/ is out of reach
    assert code == 2 and shown.startswith("error: export: runs from a checkout") and shown.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, module in cli.COMMANDS.items() if not module.startswith("lp_train.")])
def test_commands_of_a_checkout_say_so_outside_of_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "SCRIPTS", tmp_path)
    assert cli.main([*name.split(), "--help"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {name}: runs from a checkout") and shown.count("\n") == 1


def test_the_console_script_is_declared() -> None:
    assert 'lp-train = "lp_train.cli:main"' in (ROOT / "pyproject.toml").read_text()
