"""What is measured while a model trains: it changes nothing, it is what a later measurement finds, the best is kept."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from eval_files import write_eval_files
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import evaluate_run
from lp_train import finetune
from lp_train.config import load_config
from lp_train.errors import UserError
from lp_train.evaluation.progress import watched_tasks

TASKS = "evaluate.tasks=[piqa_local, gsm8k_local]"  # likelihoods and generation
STEPS = ["train.max_steps=6", "train.save_steps=2"]
WITHOUT = ["train.eval_strategy=no", *STEPS]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends: 24 tokens of an answer show as much as lm-eval's 256."""
    monkeypatch.setattr(HFLM, "max_gen_toks", 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    place = tmp_path_factory.mktemp("hook")
    model = tiny_run.save_model(place / "model", tiny_tokenizer)
    tiny_run.write_config(place / "tiny.yaml", model, tiny_run.write_text(place / "text.jsonl"))
    write_eval_files(place / "files")
    return place


def train(place: Path, name: str, *overrides: str, code: int = 0) -> Path:
    files = f"evaluate.task_data={place / 'files'}"
    assert finetune.main([str(place / "tiny.yaml"), f"train.output_dir={place / name}", files, *overrides]) == code
    return place / name


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, list]:
    return {name: value.tolist() for name, value in load_file(folder / "adapter_model.safetensors").items()}


def test_no_task_that_generates_while_weights_are_in_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    every = [f"evaluate.task_data={place / 'files'}", "train.task_steps=2", "train.eval_steps=2"]
    for tasks, refused in ((TASKS, True), ("evaluate.tasks=[piqa_local]", False)):
        config = load_config(place / "tiny.yaml", [*every, tasks])
        with pytest.raises(UserError, match=r"train.task_steps 2: .* under FSDP2") if refused else nullcontext():
            assert watched_tasks(config)


def test_measuring_changes_nothing(place: Path) -> None:
    dropout = "lora.lora_dropout=0.3"
    plain = train(place, "plain", *WITHOUT, dropout)
    watched = train(place, "watched", *STEPS, dropout, TASKS, "train.eval_steps=1", "train.task_steps=2")
    losses = [[line["loss"] for line in lines(folder) if "loss" in line] for folder in (plain, watched)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert weights(plain / "adapter") == weights(watched / "adapter")


def test_tasks_are_those_that_a_later_measurement_finds(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(place, "tasks", *STEPS, TASKS, "train.eval_steps=1", "train.task_steps=2")
    printed = capsys.readouterr().out
    measured = {line["step"]: line for line in lines(run) if "eval_tasks/piqa_local/acc_norm" in line}
    assert list(measured) == [2, 4, 6]
    start = json.loads((run / "report.json").read_text())["tasks_at_start"]
    assert f"original {start['sequential']['tasks/piqa_local/acc_norm']:.4f}" in printed
    for folder, step in (("checkpoint-4", 4), ("", 6)):  # one job for a checkpoint, and the result
        arguments = [str(run / "resolved_config.yaml"), str(run / folder)]
        assert evaluate_run.main(arguments) == 0
        found = json.loads((run / folder / "evaluation.json").read_text())
        for task in ("piqa_local", "gsm8k_local"):
            metric, results = found["tasks"][task]["metric"], found["tasks"][task]["results"]
            key = f"tasks/{task}/{metric}"
            assert results["recovered"][metric] == measured[step][f"eval_{key}"]
            assert [results[m][metric] for m in ("sequential", "paired")] == [
                start[m][key] for m in ("sequential", "paired")
            ]
        assert found["fidelity"]["recovered"]["kl"] == pytest.approx(measured[step]["eval_kl"], abs=1e-6)


def test_the_best_checkpoint_is_the_result_and_patience_ends_a_run(place: Path) -> None:
    unsteady = ["train.learning_rate=0.03", "train.lr_scheduler_type=constant", "train.warmup_steps=0"]
    best = ["train.load_best_model_at_end=true", "train.eval_steps=2", "train.early_stopping_patience=2"]
    run = train(place, "best", "train.max_steps=40", "train.save_steps=2", *best, *unsteady)
    report = json.loads((run / "report.json").read_text())
    kl = {line["step"]: line["eval_kl"] for line in lines(run) if "eval_kl" in line}
    step = min(kl, key=lambda step: kl[step])
    assert max(kl) == step + 4 < 40  # two evaluations that were no better
    assert report["result_step"] == step
    assert report["recovered"]["kl"] == kl[step]
    assert weights(run / "adapter") == weights(run / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["train.task_steps=2"], "train.task_steps 2: no tasks to measure; name some in evaluate.tasks"),
        (["train.task_steps=3", TASKS], "train.task_steps 3: not a multiple of eval_steps 2; use 4"),
        (["train.early_stopping_patience=2"], "set train.load_best_model_at_end: true"),
        (["train.early_stopping_patience=0"], "train.early_stopping_patience 0: must be above 0"),
        (["train.metric_for_best_model=loss"], "train.metric_for_best_model 'loss'"),
        (["train.load_best_model_at_end=true", "train.save_steps=3"], "train: the trainer refuses it"),
    ],
)
def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str], override: list[str], message: str) -> None:
    train(place, "refused", *override, code=2)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
