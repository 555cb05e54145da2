"""The whole recipe through its entry point, on a tiny model and local text: files, report, pinned losses, resuming."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from tiny_run import write_chats, write_text
from transformers import PreTrainedTokenizerFast

from lp_train import finetune
from lp_train.config import load_config
from lp_train.distill.trainer import PairedTrainer

SCRIPT = Path(finetune.__file__)
# Divergence per trained token at each of the four steps. Losses that move say that the training changed: find out why.
PINNED = [0.177883, 0.198532, 0.179743, 0.197605]

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Run:
    """Runs the tiny configuration with overrides, in a folder of the given name, and returns that folder."""
    shared = tmp_path_factory.mktemp("recipe")
    model = tiny_run.save_model(shared / "model", tiny_tokenizer)
    config = tiny_run.write_config(shared / "tiny.yaml", model, write_text(shared / "text.jsonl"))
    write_chats(shared / "chats.jsonl")

    def run(name: str, *arguments: str) -> Path:
        overrides = [argument.replace("{shared}", str(shared)) for argument in arguments]
        assert finetune.main([str(config), f"train.output_dir={shared / name}", *overrides]) == 0
        return shared / name

    return run


@pytest.fixture(scope="module")
def plain(run: Run) -> Path:
    return run("plain", "evaluate.prompt=What is a list?", "evaluate.max_new_tokens=3")


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_run_folder_holds_what_it_promises(plain: Path) -> None:
    names = {"adapter", "checkpoint-2", "checkpoint-4", "metrics.jsonl", "plots"}
    assert {path.name for path in plain.iterdir()} == names | {
        "starts",
        "report.json",
        "report.md",
        "report.html",
        "resolved_config.yaml",
    }
    weights = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (plain / "adapter").iterdir()} == weights | tokenizer
    plots = {"recovery.png", "position.png", "drift.png"}
    assert {path.name for path in (plain / "plots").iterdir()} == plots
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in (plain / "plots").glob("*.png"))


FIGURES = {"nll", "ppl", "kl", "top1_agreement"}
CONTRACT = {
    "plan": {"pairs", "algebra", "num_layers"},
    "sequential": FIGURES,
    "paired": FIGURES,
    "recovered": FIGURES,
    "recovery": {"nll", "kl"},
    "train": {"tokens", "trained_tokens", "dropped_tokens", "seconds", "tokens_per_second", "peak_memory_gib"},
    "environment": {"versions", "device", "commit", "distributed_type", "num_processes", "backend"}
    | {"engine", "share_held"},
}


def test_the_report_holds_what_it_promises(plain: Path) -> None:
    report = report_of(plain)
    assert {name: set(report[name]) for name in CONTRACT} == CONTRACT
    assert report["effective_depth"] == 4
    assert report["plan"] == {"pairs": [[2, 3], [4, 5]], "algebra": "lp", "num_layers": 6}
    assert report["sequential"]["kl"] == 0 and report["sequential"]["top1_agreement"] == 1
    assert report["recovered"]["kl"] < report["paired"]["kl"]
    assert report["train"]["tokens"] == 4 * 256
    assert 0.8 * 1024 < report["train"]["trained_tokens"] < 1024 and report["train"]["dropped_tokens"] == 0
    assert report["environment"]["num_processes"] == 1
    assert "control" not in report


def test_the_report_in_words(plain: Path) -> None:
    text, report = (plain / "report.md").read_text(), report_of(plain)
    assert f"| recovered | 4 | {report['recovered']['nll']:.4f} |" in text
    assert "Prompt: What is a list?" in text and "plots/recovery.png" in text
    assert set(report["sample"]) == {"prompt", "sequential", "paired", "recovered"}


def test_the_card_says_what_the_adapter_is_for(plain: Path) -> None:
    card = (plain / "adapter" / "README.md").read_text()
    assert "Trained for the paired graph" in card and "2+3, 4+5" in card and "lp_train.load" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft" and head["base_model"].endswith("/model")
    (results,) = head["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in results["metrics"]}["kl_divergence"] == report_of(plain)["recovered"]["kl"]


def test_the_resolved_configuration_is_the_run(plain: Path, run: Run) -> None:
    again = run("again", "train.max_steps=4")
    first, second = (load_config(folder / "resolved_config.yaml") for folder in (plain, again))
    assert first.train | {"output_dir": ""} == second.train | {"output_dir": ""}
    assert losses(again) == losses(plain)


def test_metrics_hold_every_step_and_evaluation(plain: Path) -> None:
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_kl" in line] == [2, 4]
    assert {"tokens_per_second", "memory_gib", "seconds_left", "learning_rate", "kd"} <= set(lines[0])
    assert [line["eval_kl"] for line in lines if "eval_kl" in line][-1] == report_of(plain)["recovered"]["kl"]


# --- the training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_losses_are_pinned_however_the_batch_is_cut(run: Run, plain: Path, rows: int, accumulation: int) -> None:
    cut = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={accumulation}"]
    folder = run(f"cut{rows}x{accumulation}", *cut)
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(folder) == pytest.approx(PINNED, rel=1e-4)
    assert report_of(folder)["recovered"]["kl"] == pytest.approx(report_of(plain)["recovered"]["kl"], rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_figures(run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_loss = PairedTrainer.compute_loss

    def stopped(self: PairedTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PairedTrainer, "compute_loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    folder = run("stopped", "--resume")
    stopped_report, report = report_of(folder), report_of(plain)
    for name in ("sequential", "paired", "recovered"):
        assert stopped_report[name] == report[name]
    assert stopped_report["train"]["trained_tokens"] == report["train"]["trained_tokens"]
    assert losses(folder) == [*losses(plain)[:3], *losses(plain)[2:]]  # step 3 was lost and made again


def test_a_finished_run_is_resumed_to_itself(run: Run, plain: Path) -> None:
    run("finished")
    assert report_of(run("finished", "--resume"))["recovered"] == report_of(plain)["recovered"]


def test_a_run_starts_from_the_adapter_of_another(run: Run, plain: Path) -> None:
    further = run("further", f"lora.start_from={plain}", "train.learning_rate=1e-9")
    report, first = report_of(further), report_of(plain)
    assert report["paired"] == first["paired"]
    assert report["recovered"]["kl"] == pytest.approx(first["recovered"]["kl"], rel=1e-5)


def test_overwrite_starts_anew(run: Run, plain: Path) -> None:
    run("twice", "loss.hidden=1")
    assert losses(run("twice", "--overwrite")) == losses(plain)


def test_cross_entropy_brings_the_control(run: Run) -> None:
    folder = run("ce", "loss.ce=0.5")
    report = report_of(folder)
    assert set(report["control"]) == FIGURES
    assert report["control"]["nll"] != report["sequential"]["nll"]
    assert 0 < report["control"]["kl"] < report["recovered"]["kl"]  # it had no pairs to recover from
    assert "control (not paired)" in (folder / "report.md").read_text()


def test_all_weights_of_the_pairs(run: Run) -> None:
    folder = run("full", "tune=full", "train.learning_rate=1e-3", "loss.hidden=1")
    report = report_of(folder)
    assert report["recovered"]["kl"] < report["paired"]["kl"]
    assert (folder / "model" / "model.safetensors").exists() and not (folder / "adapter").exists()


def test_chats_train_the_answers_alone(run: Run) -> None:
    """Every conversation is two of the text's sentences; the question, its number and the markers are not trained."""
    chats = ["data.train={shared}/chats.jsonl", "train.max_steps=2"]
    answers, everything = report_of(run("chat", *chats)), report_of(run("chat-all", *chats, "loss.kd_on=all"))
    assert 0.2 < answers["data"]["trained_tokens"] / answers["data"]["tokens"] < 0.6
    assert everything["data"]["trained_tokens"] > 0.9 * everything["data"]["tokens"]
    assert answers["train"]["trained_tokens"] < everything["train"]["trained_tokens"]


def test_epochs(run: Run) -> None:
    report = report_of(run("epochs", "train.max_steps=null", "train.num_train_epochs=1"))
    assert report["train"]["trained_tokens"] == report["data"]["trained_tokens"]


def test_half_precision_measures_the_same(run: Run, plain: Path) -> None:
    half = report_of(run("half", "model.dtype=bfloat16"))
    assert half["paired"]["kl"] == pytest.approx(report_of(plain)["paired"]["kl"], rel=0.05)


def test_the_script_hides_no_library(tmp_path: Path) -> None:
    """Python puts the script's own folder first, where ``evaluation`` or ``config`` could stand for a library."""
    code = "import atexit, sys\natexit.register(lambda: print('PATH', *sys.path, sep='\\n'))\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "key.path=value" in done.stdout, done.stderr
    entries = [Path(line).resolve() for line in done.stdout.split("PATH\n")[1].splitlines()]
    assert SCRIPT.parent not in entries and entries[0] == SCRIPT.parent.parent
