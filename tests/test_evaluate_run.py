"""The command ``scripts/evaluate_run.py`` on tiny runs: the original, untuned pairs and results side by side."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_run
from eval_files import write_eval_files
from transformers import PreTrainedTokenizerFast

import evaluate_run
from lp_train import finetune, models
from lp_train.config import ModelConfig
from lp_train.errors import UserError
from run_evaluation.statistics import compare

TASKS = "evaluate.tasks=[piqa_local, arc_easy_local, lambada_local, wikitext_local]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Runs: seed0, seed1 (same plan), other (another plan), full (tuned weights); and the files of the tasks."""
    place = tmp_path_factory.mktemp("evaluate")
    model = tiny_run.save_model(place / "model", tiny_tokenizer)
    config = tiny_run.write_config(place / "tiny.yaml", model, tiny_run.write_text(place / "text.jsonl"))
    write_eval_files(place / "files", items=12)
    runs = {"seed0": [], "seed1": ["train.seed=1"], "other": ["plan.pairs=0:2"], "full": ["tune=full"]}
    for name, overrides in runs.items():
        assert finetune.main([str(config), f"train.output_dir={place / name}", "train.max_steps=2", *overrides]) == 0
    return place


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command on runs and arguments, and returns what it prints."""

    def run(*arguments: str, code: int = 0) -> str:
        files = f"evaluate.task_data={place / 'files'}"
        given = [str(place / a) if (place / a).is_dir() else a for a in arguments]
        assert evaluate_run.main([str(place / "tiny.yaml"), *given, files]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which weights were loaded."""
    loads, load = [], models.load_base

    def spy(config: ModelConfig, *arguments: Any) -> Any:
        loads.append(Path(config.name_or_path).name)
        return load(config, *arguments)

    monkeypatch.setattr(models, "load_base", spy)
    return loads


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def items(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "items.jsonl.gz", "rt") as stream:
        return [json.loads(line) for line in stream]


def test_one_run(place: Path, run: Callable[..., str]) -> None:
    printed, report = run("seed0", TASKS), json.loads((place / "seed0" / "report.json").read_text())
    found = result(place / "seed0")
    for model in ("sequential", "paired", "recovered"):
        assert found["fidelity"][model] == pytest.approx(report[model], abs=1e-5)
    assert found["recovery"] == pytest.approx(report["recovery"], abs=1e-4)
    assert found["tasks"].keys() == {"piqa_local", "arc_easy_local", "lambada_local", "wikitext_local"}

    lines = [line for line in items(place / "seed0") if line["task"] == "arc_easy_local"]
    assert [line["doc_id"] for line in lines] == list(range(12))
    right = {m: np.array([line[m]["acc"] for line in lines]) for m in ("sequential", "paired", "recovered")}
    task = found["tasks"]["arc_easy_local"]
    assert (task["metric"], task["chance"], task["items"]) == ("acc", 0.25, 12)
    for model in ("paired", "recovered"):
        expected = compare(right["sequential"], right[model], chance=0.25).as_dict()
        assert task["comparisons"][model] == {**expected, "interval": list(expected["interval"])}
    assert task["results"]["recovered"]["acc"] == right["recovered"].mean()

    perplexity = found["tasks"]["wikitext_local"]
    nats = perplexity["comparisons"]["paired"]
    assert perplexity["unit"] == "nats" and nats["retained"] is None
    assert np.exp(nats["original"]) == pytest.approx(perplexity["results"]["sequential"]["word_perplexity"])
    assert "| recovered | 4 |" in printed and "| arc_easy acc, 12 items, 0-shot, chance 25 |" in printed
    assert "n.s." in printed and "wikitext word_perplexity, 12 items" in printed


def test_runs_side_by_side_are_those_alone(place: Path, run: Callable[..., str]) -> None:
    alone = {}
    for name in ("seed1", "other", "full"):
        run(name, "evaluate.tasks=[seven]", "evaluate.task_limit=6")
        alone[name] = result(place / name)
    printed = run("seed1", "other", "full", "evaluate.tasks=[seven]", "evaluate.task_limit=6")
    for name, expected in alone.items():
        found = result(place / name)
        for section in ("tasks", "groups", "fidelity"):
            assert found[section] == expected[section], (name, section)
        assert found["plan"]["pairs"] == json.loads((place / name / "report.json").read_text())["plan"]["pairs"]
        assert f"| recovered {name} | {found['effective_depth']} |" in printed
    assert "| seven mean of 7 tasks |" in printed
    shares = alone["full"]["groups"]["seven"]["shares"]
    assert sum(shares.values()) == pytest.approx(1) and len(shares) == 7
    report = json.loads((place / "full" / "report.json").read_text())
    assert alone["full"]["fidelity"]["recovered"] == pytest.approx(report["recovered"], abs=1e-5)


def test_seeds_are_pooled(place: Path, run: Callable[..., str], loads: list[str]) -> None:
    run("seed0", "seed1", TASKS, "--pool", "--output", str(place / "both"))
    assert loads == ["model"]  # the original, its pairs and what all runs made of them
    pooled, runs = result(place / "both"), [result(place / name) for name in ("seed0", "seed1")]
    assert pooled["seeds"] == 2
    for task in ("piqa_local", "wikitext_local"):
        found, alone = (
            pooled["tasks"][task]["comparisons"]["recovered"],
            [of_run["tasks"][task]["comparisons"]["recovered"]["other"] for of_run in runs],
        )
        assert found["other"] == pytest.approx(np.mean(alone)) and found["seeds"] == 2
        assert pooled["tasks"][task]["comparisons"]["paired"] == runs[0]["tasks"][task]["comparisons"]["paired"]
    kl = [of_run["fidelity"]["recovered"]["kl"] for of_run in runs]
    assert pooled["fidelity"]["recovered"]["kl"] == pytest.approx(np.mean(kl))

    def of_text(document: dict[str, Any]) -> list[float]:
        buckets = document["fidelity_by_position"]["buckets"]
        return [b["models"]["recovered"]["kl"] for b in buckets] + [p["recovered"] for p in document["drift"]["pairs"]]

    assert of_text(pooled) == pytest.approx(np.mean([of_text(of_run) for of_run in runs], axis=0))
    assert of_text(runs[0]) != of_text(runs[1])


def test_without_a_run_the_pairs_of_the_configuration(place: Path, run: Callable[..., str]) -> None:
    printed = run("plan.pairs=[[1, 2]]", "--output", str(place / "untuned"))
    found = result(place / "untuned")
    assert found["plan"]["pairs"] == [[1, 2]] and found["fidelity"].keys() == {"sequential", "paired"}
    assert found["tasks"] == {} and "| task |" not in printed
    names = {"evaluation.json", "items.jsonl.gz", "plots", "report.html", "report.md"}
    assert {path.name for path in (place / "untuned").iterdir()} == names


def test_what_was_measured_is_written_before_any_page(
    place: Path, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("seed0", "seed1")
    for name in names:  # without the curve of the training, as when results were copied
        shutil.copytree(place / name / "adapter", tmp_path / name / "adapter")
        for file in ("report.json", "resolved_config.yaml"):
            shutil.copy(place / name / file, tmp_path / name)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate_run, "refresh", Mock(side_effect=UserError("no page")))
        assert "no page" in run(*(str(tmp_path / name) for name in names), code=2)
    assert all(result(tmp_path / name)["fidelity"] for name in names)
    run(str(tmp_path / "seed0"))
    assert "recovered" in (tmp_path / "seed0" / "report.md").read_text()


def test_mistakes(place: Path, run: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no such folder" in run(str(tmp_path / "none"), code=2)
    assert "holds no adapter or model of a run; name a run folder" in run(str(tmp_path), code=2)
    assert (
        run("seed0", "--pool", code=2)
        == "error: --pool: the mean of several runs needs a folder; add --output FOLDER\n"
    )
    message = run("seed0", "other", "--pool", "--output", str(tmp_path / "out"), code=2)
    assert message.startswith("error: --pool: seeds of one recipe") and not (tmp_path / "out").exists()
    assert "evaluate.task_limit 0: must be at least 1" in run("evaluate.task_limit=0", code=2)
    assert "evaluate.num_fewshot -1: must be 0 or more" in run("evaluate.num_fewshot=-1", code=2)


def test_without_lm_eval_there_is_help_and_a_line_that_says_what_is_missing(place: Path) -> None:
    program = """
import sys
sys.modules["lm_eval"] = None
import evaluate_run
assert evaluate_run.main([sys.argv[1]]) == 2
evaluate_run.main(["--help"])
"""
    command = [sys.executable, "-c", program, str(place / "tiny.yaml")]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=Path(evaluate_run.__file__).parent)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: evaluate_run.py"), shown.stderr
    assert shown.stderr == 'error: evaluation: needs the package lm-eval; run `pip install -e ".[eval]"`\n'
