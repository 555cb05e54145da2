"""README and recipes: their commands run, their links and files exist, their figures are those of stored reports."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import infer_table, trade_off
from lp_train.config import load_config
from lp_train.evaluation import plots
from lp_train.finetune import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("recipes/**/*.md"))]
RESULTS = ROOT / "recipes" / "smollm2_135m" / "results"


COMMAND = re.compile(r"(?:[A-Z]+=\S+ )*(?:accelerate|bash|git|lp-train|pip|python3?|pytest|sbatch|torchrun) [^#`]+")


def commands(documents: list[Path] = DOCUMENTS) -> list[str]:
    """Every command of the documents, in blocks and in lines, continued lines joined, without its comment."""
    found: dict[str, None] = {}
    for document in documents:
        text = document.read_text().replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()] + re.findall(r"`([^`\n]+)`", text)
        found |= dict.fromkeys(" ".join(match[0].split()) for line in lines if (match := COMMAND.match(line)))
    return list(found)


LAUNCHED = r"accelerate launch (?:--config_file \S+ |--\S+ )*lp_train/finetune\.py"
FINETUNE = re.compile(rf"(?:{LAUNCHED}|lp-train finetune) (configs/(?!NAME).+)")
TRAINS = [match[1] for command in commands() if (match := FINETUNE.match(command))]
OTHERS = [command for command in commands() if not FINETUNE.match(command) and command != "accelerate launch --quiet"]


@pytest.mark.parametrize("command", TRAINS)
def test_every_finetune_command_dry_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    arguments = [a for a in shlex.split(command) if a != "--dry-run"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "effective depth" in capsys.readouterr().out


class Parsed(Exception):
    """A program has understood its command line, and would begin."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def stop(*arguments: object, parse: Callable[..., object] = parse) -> None:
            raise Parsed(parse(*arguments))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT)


def python_program(words: list[str]) -> tuple[str, list[str]] | None:
    """Of ``python PROGRAM ...`` and what launches the same: the file, and its arguments."""
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *(word for word in words[2:] if not word.startswith("--") or word == "--module")]
        words = [word for word in words if not word.isdigit() and not word.startswith("configs/accelerate/")]
        words = ["-m" if word == "--module" else word for word in words]
    if words[0] == "lp-train":
        return "lp_train/cli.py", words[1:]
    if words[0] not in ("python", "python3"):
        return None
    if words[1] != "-m":
        return words[1], words[2:]
    file = words[2].replace(".", "/") + ".py"
    return file if (ROOT / file).exists() else f"scripts/{file}", words[3:]


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_is_understood(
    command: str, parse_only: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Python program by its own parser (one without runs), and its configuration with the overrides; of a shell's the
    files are there."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z]+=\S+", word)]
    given = [word for word in words[1:] if word.startswith(("configs/", "scripts/", "slurm/")) and "NAME" not in word]
    assert all((ROOT / word).exists() for word in given)
    if program := python_program(words):
        file, arguments = program
        files = {word: sorted(map(str, ROOT.glob(word))) for word in arguments if "*" in word and "=" not in word}
        monkeypatch.setattr(sys, "argv", [file, *(part for word in arguments for part in files.get(word, [word]))])
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        except Parsed:
            pass
        except SystemExit:
            pytest.fail(capsys.readouterr().err)
        overrides = [word for word in arguments if re.match(r"[a-z]+\.[a-z_.]+=", word)]
        for config in (word for word in given if word.endswith(".yaml") and "accelerate" not in word):
            load_config(config, overrides)
    elif words[0] == "sbatch":
        assert [word for word in words if re.fullmatch(r"slurm/\w+\.sbatch", word)]
    elif words[0] == "bash":
        assert subprocess.run(["bash", "-n", words[1]]).returncode == 0
    else:
        assert words[0] in ("git", "pip"), f"{command}: no test knows such a command; add it here"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    paths = re.findall(r"`((?:lp_train|configs|recipes|scripts|slurm|tests)/[\w./]*\w)`", text)
    missing = [file for file, _, _ in links if not (document.parent / file).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    headings = [(head, document.parent / (file or document.name)) for file, _, head in links if head]
    assert not [head for head, page in headings if head not in anchors(page)]


def anchors(document: Path) -> set[str]:
    """The headings of a page, or of a folder's README, as GitHub makes links of them."""
    page = document / "README.md" if document.is_dir() else document
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


RECIPE = ROOT / "recipes" / "smollm2_135m" / "README.md"


@pytest.mark.parametrize("depth", [25, 22, 19])
def test_result_tables_are_those_of_the_reports(depth: int) -> None:
    plain = result_row(json.loads((RESULTS / f"depth{depth}.json").read_text()))
    best = trade_off.row(trade_off.read(RESULTS / "best" / f"depth{depth}"))
    assert plain in RECIPE.read_text(), f"{RECIPE} lacks the line\n{plain}"
    for document in (DOCUMENTS[0], RECIPE):
        assert f"| {' | '.join(best)} |" in document.read_text(), f"{document} lacks the line\n{best}"


CONTROLS = {
    "pairs": "pairs, greedy",
    "window": "pairs, window",
    "influence": "dropped, block influence",
    "block": "dropped, contiguous",
    "drop": "dropped, second layers",
    "merge": "merged",
    "influence_suffix": "dropped, block influence, `lora.scope=suffix`",
}


@pytest.mark.parametrize("depth", [25, 22, 19])
def test_the_table_of_controls_is_that_of_the_reports(depth: int) -> None:
    folder = RESULTS / "selection" / "h200_ed22901"
    files = {name: folder / f"{name}_{depth}.json" for name in CONTROLS}
    reports = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    assert len(reports) >= 6
    for name, report in reports.items():
        cost = report["cost"]
        cells = [
            str(report["effective_depth"]),
            CONTROLS[name],
            f"{cost['paired']['parameters'] / 1e6:.1f} M",
            f"{cost['trainable'] / 1e6:.1f} M",
            f"{cost['paired']['flops_per_token'] / 1e6:.0f}",
            f"{cost['paired']['kv_bytes_per_token']:,}",
            *(f"{report[model]['kl']:.3f}" for model in ("paired", "recovered")),
            f"{report['recovered']['nll']:.3f}",
        ]
        assert f"| {' | '.join(cells)} |" in RECIPE.read_text(), cells
    best = min(reports[name]["recovered"]["kl"] for name in reports if name not in ("pairs", "window"))
    stated = re.search(
        r"ends at KLs of\s+(.*?) at depths (.*?) at best.*?pairs\s+end\s+at\s+([\d., and\s]+)",
        DOCUMENTS[0].read_text(),
        re.S,
    )
    place = re.findall(r"\d+", stated[2]).index(str(depth))
    figures = [re.findall(r"\d\.\d+", stated[part])[place] for part in (1, 3)]
    assert figures == [f"{best:.3f}", f"{reports['pairs']['recovered']['kl']:.3f}"]


def result_row(report: dict) -> str:
    """One run as a line of the result table."""
    cells = [
        str(report["effective_depth"]),
        *(f"{report[name]['nll']:.3f}" for name in ("sequential", "paired", "recovered")),
        *(f"{report[name]['kl']:.3f}" for name in ("paired", "recovered")),
        f"{report['recovered']['top1_agreement']:.1%}",
        f"**{report['recovery']['nll']:.0%}**",
        f"**{report['recovery']['kl']:.0%}**",
        f"{report['train']['seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_demos_output_is_that_of_its_report() -> None:
    report = json.loads((RESULTS / "demo_cpu_float32.json").read_text())
    table = []
    for name, label in plots.NAMES.items():
        found, depth = report[name], 30 if name == "sequential" else report["effective_depth"]
        figures = f"{found['nll']:.4f} | {found['ppl']:.2f} | {found['kl']:.4f} | {found['top1_agreement']:.1%}"
        back = "{nll:.0%} | {kl:.0%} |".format(**report["recovery"]) if name == "recovered" else "| |"
        table.append(f"| {label} | {depth} | {figures} | {back}")
    assert "\n".join(table) in DOCUMENTS[0].read_text()


MEASURED = ROOT / "recipes" / "benchmarks" / "results"
SHAPES = {"8B": "llama-8b", "3B": "llama-3b", "1B": "llama-1b", "Llama 2 7B": "llama2-7b", "SmolLM2": "smollm2-135m"}
PLACES = {"H200": "infer_h200", "two H200": "tensor_parallel_h200", "two H100": "tensor_parallel_h100"}
DECODED = (
    r"^\| ([\w ]+), (\d+) \| ((?:two )?H[12]00)(?:, ([\w, ]+))? \| ([\d.]+) x \| ([\d.]+|[\w ]+?)(?: x)? \| ([^|]+) \|$"
)
DECODING = re.findall(DECODED, DOCUMENTS[0].read_text(), flags=re.MULTILINE)


def test_the_readme_has_its_rows_of_decoding() -> None:
    assert len(DECODING) > 10


@pytest.mark.parametrize("row", DECODING, ids=" ".join)
def test_decoding_of_the_readme_is_that_of_the_stored_steps(row: tuple[str, ...]) -> None:
    shape, pairs, place, what, graph, compiled, eager = row
    files = [file for file in MEASURED.glob(f"{PLACES[place]}/*.jsonl") if of_shape(file, SHAPES[shape])]
    if shape == "SmolLM2":  # a trained run
        files = [RESULTS / "best" / "depth22" / "infer.jsonl"]
    measured = "generate" if what == "4,096 tokens" else "decode"
    assert graph in speed_ups(files, int(pairs), "graph", measured)
    assert not compiled[0].isdigit() or compiled in speed_ups(files, int(pairs), "compile", "decode")
    generated = re.findall(r"\d\.\d\d", eager)
    assert sorted(generated) == sorted(speed_ups(files, int(pairs), "eager", "generate"))


def of_shape(file: Path, shape: str) -> bool:
    return {json.loads(line)["case"]["shape"] for line in file.open()} == {shape}


def speed_ups(files: list[Path], pairs: int, mode: str, what: str) -> list[str]:
    """Of in order over fused at batch 1 and a file's shortest context, each file one run."""
    found = []
    for run in (run for file in files for run in infer_table.read([file])):
        cells = [c for c in run["cells"] if (c["batch"], c["mode"], c["what"]) == (1, mode, what)]
        cells = [cell for cell in cells if cell["context"] == min(cell["context"] for cell in cells)]
        depth = max((cell["layers"] for cell in cells), default=0)
        found += [f"{cell['speedup']:.2f}" for cell in cells if cell["layers"] == depth - pairs and cell["speedup"]]
    return found


def test_training_of_the_readme_is_that_of_the_stored_steps() -> None:
    """Tokens/s without and with FlashAttention 4, and the peaks, each of the row's own case."""
    stored: dict[tuple[str, bool, bool], list[dict]] = {}
    for line in map(json.loads, (MEASURED / "train_h200.jsonl").open()):
        case = line["case"]
        if "ours" in line["variants"]:
            asked = (case["shape"], case["gradient_checkpointing"], case["fp8"])
            stored.setdefault(asked, []).append(line["variants"]["ours"])
    row = re.compile(r"^\| (8B|3B|SmolLM2), \d([^|]*) \|([^|]+\|[^|]+)\|.* ([\d., ]+) \|$", flags=re.MULTILINE)
    rows = row.findall(DOCUMENTS[0].read_text())
    for shape, options, speeds, peaks in rows:
        ours = stored[SHAPES[shape], "checkpointed" in options, "FP8" in options]
        assert set(re.findall(r"\d+,\d{3}", speeds)) <= {f"{of['tokens_per_second']:,.0f}" for of in ours}
        assert set(peaks.split(", ")) <= {f"{of['peak_gib']:.1f}" for of in ours}
    assert len(rows) == 5


def test_the_log_is_in_order_of_dates() -> None:
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d) ", (ROOT / "recipes" / "LOG.md").read_text(), flags=re.MULTILINE)
    assert len(dates) > 5 and dates == sorted(dates, reverse=True)
