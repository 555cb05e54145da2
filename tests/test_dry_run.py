"""The dry run of every configuration of the repository, without network and without weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lp_train import dry_run as module
from lp_train.bench.shapes import build_on_meta
from lp_train.config import Config, load_config
from lp_train.dry_run import count_steps, dry_run, mark, read_model_config
from lp_train.errors import UserError
from lp_train.evaluation.report import plan_section
from lp_train.evaluation.tables import draw
from lp_train.pairing import PairPlan

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def offline(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be reached; SmolLM2's tokenizer is a tiny one."""

    def unreachable(*args: Any) -> Any:
        raise UserError("model.name_or_path: cannot be loaded")

    monkeypatch.setattr(module, "load_model_config", unreachable)
    monkeypatch.setattr(module, "load_tokenizer", lambda model: tiny_tokenizer)


@pytest.fixture
def run(tmp_path: Path, offline: None) -> Config:
    """A run on Llama 3.2 1B's shape and a small file of text."""
    text = "\n".join(f'{{"text": "The parser reads token {i} from the stream."}}' for i in range(400))
    (tmp_path / "text.jsonl").write_text(text)
    file = tmp_path / "run.yaml"
    file.write_text(
        "{model: {name_or_path: meta-llama/Llama-3.2-1B}, plan: {pairs: '8:14'}, train: {max_steps: 10, "
        f"max_length: 128, global_batch_tokens: 1024}}, data: {{train: {tmp_path}/text.jsonl, eval_fraction: 0.1}}}}"
    )
    return load_config(file)


def printed(config: Config, capsys: pytest.CaptureFixture, processes: int = 1) -> str:
    dry_run(config, processes)
    return capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_dry(path: Path, offline: None, capsys: pytest.CaptureFixture) -> None:
    out = printed(load_config(path), capsys)
    assert "shape is that of configs/shapes/" in out
    for item in ("effective depth", "trainable", "FLOPs per token", "AdamW", "global batch", "steps", "row 3: "):
        assert item in out


def test_what_was_replaced_is_said(offline: None, capsys: pytest.CaptureFixture) -> None:
    out = printed(load_config(CONFIGS[0].parent / "llama1b.yaml"), capsys)
    notes = [line for line in out.split("\n") if line.startswith("note: ")]
    assert "configs/shapes/Llama-3.2-1B.json" in notes[1]
    assert "fineweb-edu" in notes[2]
    assert "builtin:pydocs instead" in notes[3]


def test_the_figures(run: Config, capsys: pytest.CaptureFixture) -> None:
    out = printed(run, capsys)
    assert "effective depth  13 of 16 layers" in out
    assert "1,235,814,400" in out
    assert "4,227,072 (0.34%)" in out  # 6 layers x 16 x (2 x 4096 + 2 x 2560 + 3 x 10240)
    assert re.search(r"8 rows x 1 accumulated x 1 process x 128 = 1,024 tokens\n  steps +10\n  tokens +10,240", out)
    assert "4 rows x 1 accumulated x 2 processes x 128" in printed(run, capsys, 2)


def test_copies_of_weights_in_fp8_are_counted(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = printed(load_config(tmp_path / "run.yaml", ["train.fp8=true", "model.dtype=bfloat16"]), capsys)
    copies = re.search(r"FP8 copies of them +([0-9.]+) GiB", out)
    assert copies is not None and "FP8" not in printed(run, capsys)
    frozen = 16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)  # of 16 layers: q and o, k and v, the MLP
    assert float(copies[1]) == pytest.approx(2 * frozen / 2**30, rel=0.01)


def test_the_users_own_text_is_shown(run: Config, capsys: pytest.CaptureFixture) -> None:
    out = printed(run, capsys)
    assert "builtin:pydocs" not in out
    assert re.search(r"  row 1: 1\d\d tokens, \d+ trained, \d+ documents?\n.*\[\[.*token \d+ from the stream", out)


def test_no_tokenizer_no_rows(run: Config, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_tokenizer", module.load_model_config)
    out = printed(run, capsys)
    assert "without a tokenizer no rows are shown" in out
    assert "training rows" not in out


def test_mistakes_are_found(run: Config, tmp_path: Path) -> None:
    for override, message in {
        "plan.pairs=8:18": "out of range",
        "model.name_or_path=some/other": "cannot be loaded",
        "lora.target_modules=[query]": "matches no projection",
    }.items():
        with pytest.raises(UserError, match=message):
            dry_run(load_config(tmp_path / "run.yaml", [override]), 1)
    with pytest.raises(UserError, match="not a multiple"):
        dry_run(run, 3)


def test_sdpa_for_gemma_2_is_a_mistake(offline: None) -> None:
    config = load_config(CONFIGS[0].parent / "gemma2_2b.yaml", ["model.attn_implementation=nonsense"])
    shape, _ = read_model_config(config.model)
    with pytest.raises(UserError, match="nonsense.*not for this model.*use eager"):
        build_on_meta(shape, PairPlan.parse(config.plan.pairs, 26), config, torch.bfloat16)


def test_the_drawing() -> None:
    assert draw(plan_section(PairPlan.parse([[1, 2], [4, 5]], 7), "lp")) == "\n".join(
        [
            "    ╭ 1╮    ╭ 4╮",
            "─ 0─┤  ├─ 3─┤  ├─ 6─",
            "    ╰ 2╯    ╰ 5╯",
        ]
    )


def test_a_long_drawing_is_wrapped_and_complete() -> None:
    drawing = draw(plan_section(PairPlan.parse("40:60", 80), "lp"))
    assert max(map(len, drawing.split("\n"))) <= 72
    assert [int(n) for n in sorted(re.findall(r"\d+", drawing), key=int)] == list(range(80))


def test_steps(run: Config, tmp_path: Path) -> None:
    assert count_steps(run, torch.float32, None) == 10
    slow = load_config(tmp_path / "run.yaml", ["train.max_steps_float32=4"])
    assert count_steps(slow, torch.float32, None) == 4
    assert count_steps(slow, torch.bfloat16, None) == 10


def test_steps_of_epochs_follow_from_the_text(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = load_config(tmp_path / "run.yaml", ["train.max_steps=null", "train.num_train_epochs=2"])
    steps = re.search(r"steps +(\d+)", printed(config, capsys))
    assert steps is not None
    assert int(steps[1]) > 2


def test_trained_text_is_marked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    untrained, trained = tiny_tokenizer("a ")["input_ids"], tiny_tokenizer("b c")["input_ids"]
    row = {"input_ids": untrained + trained, "labels": [-100] * len(untrained) + trained}
    assert mark(row, tiny_tokenizer) == "a [[b c]]"


def test_long_rows_are_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer("word " * 400)["input_ids"]
    shown = mark({"input_ids": ids, "labels": ids}, tiny_tokenizer)
    assert len(shown) == 400 + len("[[...]]")
