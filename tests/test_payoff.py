"""``doctor --plan``: will a plan pay on this machine? Figures of tiny models, and each way to have none."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from family_cases import CASES
from transformers import PreTrainedTokenizerFast

import doctor_plan
from benchmarks import payoff
from lp_train.bench.shapes import build_on_meta
from lp_train.cluster import doctor
from lp_train.config import load_config
from lp_train.errors import UserError
from lp_train.pairing import PairPlan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payoff, "BUDGET", 0.002)


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    return str(tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl")))


def rows(output: str) -> dict[str, str]:
    """The kind and text of each line by its name."""
    return {line[:16].strip(): " ".join(line[16:].split()) for line in output.splitlines()[2:]}


def test_the_plan_of_a_tiny_model(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path(config).parent.rglob("*"))
    assert doctor_plan.main([config]) == 0
    shown = capsys.readouterr().out
    found = rows(shown)
    assert shown.startswith("tiny: ") and "2 pairs (2+3 4+5), depth 6 -> 4, by lp\n" in shown
    assert re.match(
        r"measured CPU, 1 threads, float32: [\d.e-]+ TFLOP/s in products, [\d.]+ GB/s", found["this machine"]
    )
    assert re.match(r"computed 0\.0 GiB and 0\.00 per 1,000 cached: fits, of [\d.]+ here", found["memory to run"])
    assert "by the estimate of --dry-run (ddp)" in found["memory to train"]
    assert re.match(r"predicted [\d.]+ x: [\d.]+ ms a token in order, [\d.]+ fused", found["speed-up"])
    assert re.match(r"predicted 4 steps of 256 tokens: [\d.]+ s at 60 % \(the demo", found["training"])
    assert sorted(Path(config).parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "name", "says"),
    [
        (["plan.algebra=par"], "speed-up", "none no pair can be fused, so none is faster: algebra par: each feed"),
        (["plan.kind=drop"], "speed-up", "none plan.kind drop: a control of training"),
        (["train.max_steps=null", "train.num_train_epochs=1"], "training", "none epochs of text that was not read"),
    ],
)
def test_what_cannot_be_predicted_says_why(
    overrides: list[str], name: str, says: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_plan.main([config, *overrides]) == 0
    found = rows(capsys.readouterr().out)
    assert found[name].startswith(says)
    assert "paid back" not in found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--plan: needs a configuration; give a YAML file"),
        (["{config}", "plan.pairs=2:9"], "pair"),
        (["{config}", "train.per_device_train_batch_size=3"], "does not divide the 4 rows"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_plan.main([a.format(config=config) for a in arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and says in shown and shown.count("\n") == 1


def test_bf16_on_a_processor_without_it_is_told() -> None:
    rates = payoff.Rates(1e9, 1e9)
    told = "; it has no bf16 of its own, so set model.dtype=auto" in doctor_plan._device(torch.bfloat16, CPU, rates)
    assert told != doctor.models.multiplies_bf16(CPU)
    assert "auto" not in doctor_plan._device(torch.float32, CPU, rates)


@pytest.mark.parametrize(("load", "told"), [(0.3, False), (1000.0, True)])
def test_a_busy_machine_is_told(load: float, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    shown = doctor_plan._device(torch.float32, CPU, payoff.Rates(1e9, 1e9))
    assert ("; it is busy (load 1000.0), so all times here are too long" in shown) == told


def test_a_saved_second_pays_training_back(config: str) -> None:
    loaded = load_config(config, [])
    model = doctor._shapes(loaded)
    (_, _, training), (name, _, back) = doctor_plan._training(loaded, model, 1e6, CPU, saved=0.5)
    took = doctor_plan.step_flops(model, loaded, [64]).total(1, 1) * 4 * 256 / 1e6
    assert training.startswith(f"4 steps of 256 tokens: {doctor_plan.spoken(took / 0.6)} at 60 %")
    assert (name, back) == ("paid back", f"after {took / 0.6 / 0.5:,.0f} tokens decoded at batch 1")
    assert "never here" in doctor_plan._training(loaded, model, 1e6, CPU, saved=0.0)[-1][-1]
    *_, (_, _, on_a_gpu) = doctor_plan._training(loaded, model, 1e6, torch.device("cuda"), saved=0.5)
    assert on_a_gpu == f"after {took / 0.68 / 0.5:,.0f} to {took / 0.29 / 0.5:,.0f} tokens decoded at batch 1"
    assert len(doctor_plan._training(loaded, model, 1e6, CPU, saved=None)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23, "1.2 s"), (119, "119.0 s"), (150, "2.5 min"), (7200, "2.0 h"), (864000, "10.0 days")]
)
def test_times_in_their_largest_unit(seconds: float, text: str) -> None:
    assert doctor_plan.spoken(seconds) == text


def test_the_rule_of_the_prediction() -> None:
    """10 layers of 3 ms behind 1 ms that come once, a head of 2 ms; a pair of two layers takes 4 instead of 6 ms."""
    found = payoff.predicted(two=7e-3, one=4e-3, wide=5e-3, layers=10, pairs=3, head=2e-3)
    assert found.in_order == pytest.approx(33e-3) and found.fused == pytest.approx(27e-3)
    lucky = payoff.predicted(two=7e-3, one=4e-3, wide=0.0, layers=10, pairs=3, head=2e-3)
    assert lucky.fused == pytest.approx(33e-3 - 3 * 3e-3)  # no pair saves more than a layer
    noisy = payoff.predicted(two=4e-3, one=5e-3, wide=4e-3, layers=10, pairs=3, head=0.0)
    assert noisy.in_order == noisy.fused == pytest.approx(20e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"])
def test_layers_of_every_family_that_fuses_are_timed(family: str, config: str) -> None:
    shape, loaded = CASES[family].model().config, load_config(config, [])
    model = build_on_meta(shape, PairPlan.parse("4:6", num_layers=shape.num_hidden_layers), loaded, torch.float32)
    found = payoff.decoding(model, CPU, room_gib=1.0)
    assert found.in_order > 0 and found.fused > 0
    assert model.config.num_hidden_layers == 6
    with pytest.raises(UserError, match=r"not timed: four layers and the head take 0\.0 GiB, 0\.0 are free"):
        payoff.decoding(model, CPU, room_gib=0.0)


def test_what_takes_long_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(payoff, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def run(took: float) -> None:
        calls.append(took)
        clock[0] += took

    assert payoff.seconds(CPU, lambda: run(1.0), lambda: run(0.5)) == [1.0, 0.5] and calls == [1.0, 0.5]
    calls.clear()
    assert payoff.seconds(CPU, lambda: run(0.001), lambda: run(0.0005)) == pytest.approx([0.001, 0.0005])
    assert calls in ([0.001, 0.0005] * 4, [0.001, 0.0005] * 5)  # 4 ms in turns of 1.5 ms, after the first


def test_the_doctor_names_the_command(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--plan", config]) == 2
    assert "run lp-train doctor --plan CONFIG" in capsys.readouterr().err
