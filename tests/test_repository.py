"""What holds for the repository as a whole: imports point one way, nothing is long, every configuration loads, and no
setting or file is left that nothing uses."""

import ast
import dataclasses
import graphlib
import json
import re
import statistics
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from lp_train.config import SECTIONS, Source, load_config

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lp_train").rglob("*.py"))
}


@cache
def tracked() -> dict[str, str]:
    """The text of each file of the repository, "" for what is no text."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    texts = {}
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            texts[name] = (ROOT / name).read_bytes().decode(errors="ignore") if not name.endswith(".png") else ""
    return texts


def imports(path: Path) -> set[str]:
    """Modules of lp_train that the file imports, also inside of functions; not those for type checkers only."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(node) for block in typing_only for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_imports_have_no_cycle() -> None:
    graph = {name: imports(path) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 100
    list(graphlib.TopologicalSorter(graph).static_order())


def test_arrows_point_down() -> None:
    """Pairing knows nothing of the rest, and nothing below knows the recipe."""
    for name, path in MODULES.items():
        used = {module.split(".")[1] for module in imports(path) if "." in module}
        if name.startswith("lp_train.pairing"):
            assert used <= {"pairing", "errors", "modeling_layer_parallel"}, name
        if name not in ("lp_train.finetune", "lp_train.cli"):
            assert not used & {"finetune", "cli"}, name


def arrows() -> dict[str, set[str]]:
    """Between the folders and single modules right below lp_train."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if name != "lp_train":
            at, *used = (module.split(".")[1] for module in (name, *imports(path)) if "." in module)
            found[at] = found.get(at, set()) | set(used) - {at, "errors"}
    return {at: used for at, used in found.items() if used}


def test_the_arrows_are_those_that_are_drawn() -> None:
    drawn = re.findall(r"^    (\w+) +-> (.+)$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert {at: set(used.split()) for at, used in drawn} == arrows()


def test_the_library_does_not_import_the_scripts() -> None:
    """But for the command line, which starts them by name where they are."""
    commands = {
        path.stem for path in (ROOT / "scripts").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert {"benchmarks", "run_evaluation", "export"} <= commands
    for name, path in MODULES.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        used = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        used |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        assert not {module.partition(".")[0] for module in used} & commands, name


def test_functions_and_files_are_short() -> None:
    lengths = {}
    for name, text in tracked().items():
        if not name.endswith(".py"):
            continue
        assert len(text.splitlines()) < 400, name
        for node in ast.walk(ast.parse(text)) if name.startswith(("lp_train", "scripts")) else ():
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name}:{node.name}:{node.lineno}"] = (node.end_lineno or 0) - node.lineno + 1
    assert statistics.median(lengths.values()) <= 15
    assert sum(length <= 60 for length in lengths.values()) >= 0.9 * len(lengths)
    assert not {name for name, length in lengths.items() if length > 100}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.*")), ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    """Runs by our schema, engines by accelerate, shapes by Transformers; tasks are YAML, and run in test_tasks.py."""
    folder = path.parent.name
    if path.suffix == ".yaml" and folder == "configs":
        load_config(path)
    elif folder == "accelerate":
        assert load_config_from_file(str(path)).num_processes >= 1
    elif folder == "shapes":
        shape = json.loads(path.read_text())
        assert AutoConfig.for_model(**shape).num_hidden_layers == shape["num_hidden_layers"]
    elif path.suffix == ".yaml":
        yaml.add_constructor("!function", lambda *_: None, yaml.SafeLoader)
        assert yaml.safe_load(path.read_text())
    else:
        assert folder in ("tasks", "__pycache__"), f"{path}: no test loads such a file; add it here"


def test_every_key_of_the_schema_is_used() -> None:
    """Each is read somewhere besides where it is declared."""
    programs = {
        n: text for n, text in tracked().items() if n.startswith(("lp_train/", "scripts/")) and n.endswith(".py")
    }
    code = "\n".join(text for name, text in programs.items() if name != "lp_train/config.py")
    keys = {f"{cls.__name__}.{field.name}" for cls in (*SECTIONS, Source) for field in dataclasses.fields(cls)}
    assert not {key for key in keys if not re.search(rf"\.{key.partition('.')[2]}\b", code)}


def test_every_file_is_reached() -> None:
    """By pytest, git or lm-eval itself, or because another file names it, or its folder where that holds results."""
    words = {name: set(re.findall(r"[\w.-]*\w|\w+", text)) for name, text in tracked().items()}
    parts = {name: {part for word in found for part in (word, *word.split("."))} for name, found in words.items()}
    lost = []
    for path in map(Path, tracked()):
        if path.name.startswith(("test_", ".git", "group_")) or str(path) == ".ci/run":
            continue
        names = {path.name, path.stem} | ({path.parent.name} - {"results"} if "results" in path.parts else set())
        if not any(names & found for other, found in parts.items() if other != str(path)):
            lost.append(str(path))
    assert not lost
