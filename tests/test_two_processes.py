"""The real program on two CPU processes against one, on the same global batch.

Only ``ACCELERATE_USE_CPU`` with ``--multi_gpu`` forms a world of two on gloo; with other switches each process believes
that it is alone, and ends with exit code 0: hence the world size is looked at first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import ROOT, ends, start
from safetensors.torch import load_file
from tiny_run import save_model, write_config, write_text
from transformers import PreTrainedTokenizerFast

STEPS = 3
# Eight rows of 64 tokens in micro-batches of one: eight of them on one process, four on each of two.
OPTIONS = (
    f"train.max_steps={STEPS}",
    "train.per_device_train_batch_size=1",
    "train.global_batch_tokens=512",
    "train.eval_steps=3",
    "train.save_steps=3",
    "loss.ce=0.25",
    "loss.hidden=0.5",
    "evaluate.tokens=700",
    "evaluate.batch_size=2",
)


def assert_same_figures(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """To 1e-5 each, but perplexity, exp(NLL), which by the same 1e-5 of the NLL is off by 1e-5 of itself."""
    ppl, expected = ours.pop("ppl"), theirs.pop("ppl")
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ppl == pytest.approx(expected, rel=1e-5)


def launch(config: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Runs the program on two processes by its launcher, asserts that it succeeded, and returns its report."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["WANDB_MODE"] = "offline"  # conftest.py disables it
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "lp_train" / "finetune.py"), str(config)]
    command += [f"train.output_dir={folder}", *OPTIONS, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=config.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text())


def train_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, text = save_model(tmp_path / "model", tiny_tokenizer), write_text(tmp_path / "text.jsonl", 160)
    config, (one, two) = write_config(tmp_path / "tiny.yaml", model, text), (tmp_path / "one", tmp_path / "two")
    program = [str(ROOT / "lp_train" / "finetune.py"), str(config), f"train.output_dir={one}", *OPTIONS]
    codes, output = ends(start(program))
    assert codes == [0], output
    alone, together = json.loads((one / "report.json").read_text()), launch(config, two, "track.wandb=offline")
    assert len(list((two / "wandb").glob("offline-run-*"))) == 1  # of rank 0 alone

    environment = together["environment"]
    assert (environment["num_processes"], environment["backend"]) == (2, "gloo")
    assert alone["environment"]["num_processes"] == 1

    for name in ("loss", "kd", "ce", "hidden", "grad_norm", "trained_tokens"):
        ours, theirs = ([line[name] for line in train_lines(folder)] for folder in (two, one))
        assert len(ours) == STEPS
        assert ours == pytest.approx(theirs, rel=1e-5), name
    for model_name in ("sequential", "paired"):
        assert together[model_name] == pytest.approx(alone[model_name], abs=1e-6)
    assert_same_figures(together["recovered"], alone["recovered"])
    assert together["evaluation"] == alone["evaluation"]
    assert_same_figures(together["control"], alone["control"])
    for name in ("tokens", "trained_tokens"):
        assert together["train"][name] == alone["train"][name]

    weights, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
