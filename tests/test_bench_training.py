"""scripts/bench.py on tiny shapes: what is compared trains the same, and the figures are what they say."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import PartialState

from benchmarks import losses, results, sweep, table, training
from benchmarks.case import SHAPES, Case, model_config, plan, random_rows, window
from lp_train.data import RowCollator
from lp_train.errors import UserError
from lp_train.finetune import quieten_libraries

TINY = Case(
    "smollm2-135m",
    batch=2,
    seq=24,
    pairs="1:3",
    rank=4,
    steps=2,
    warmup=1,
    documents=2,
    vocab=256,
    layers=4,
    compile=False,
    dtype="float32",
)
ARGUMENTS = [
    *("--shape", "smollm2-135m", "--layers", "4", "--pairs", "1:3", "--batch", "1", "--seq", "16"),
    *("--steps", "1", "--warmup", "1", "--vocab", "128", "--dtype", "float32", "--no-compile"),
]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", Path(__file__).parents[1] / "scripts" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    quieten_libraries()
    return training.run(TINY, ["ours", "a", "b", "c"], say=lambda line: None)


# --- the case


@pytest.mark.parametrize(
    ("shape", "pairs", "first", "size"),
    [
        ("llama-8b", 7, 15, (8, 2048)),
        ("llama-3b", 5, 15, (8, 2048)),
        ("llama-1b", 2, 8, (8, 2048)),
        ("qwen3-4b", 4, 18, (8, 2048)),
        ("smollm2-135m", 5, 4, (32, 1024)),
    ],
)
def test_each_shape_has_its_pairs_and_batch(shape: str, pairs: int, first: int, size: tuple[int, int]) -> None:
    found = plan(Case(shape))
    assert (len(found.pairs), found.first_layer, Case(shape).size) == (pairs, first, size)


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_and_vocabulary_can_be_set(shape: str) -> None:
    config = model_config(Case(shape, layers=4, vocab=512))
    assert (config.num_hidden_layers, config.vocab_size) == (4, 512)
    assert len(getattr(config, "layer_types", None) or range(4)) == 4
    assert plan(Case(shape, layers=4)).pairs == ((2, 3),)


def test_a_window_holds_as_many_pairs_as_fit() -> None:
    assert [window(16, first, 5) for first in (4, 8, 12)] == ["4:14", "8:16", "12:16"]


def test_rows_are_full_and_hold_the_documents() -> None:
    case = dataclasses.replace(TINY, documents=3)
    rows = random_rows(case)
    batch = RowCollator(case.size[1], pad_token_id=0)(list(rows))
    assert batch["input_ids"].shape == (6, 24) and case.lengths == [8, 8, 8]
    assert batch["position_ids"][0].tolist() == [*range(8)] * 3
    trained = batch["labels"] != -100
    assert trained[:2].sum() == case.trained_tokens == 42
    assert (batch["labels"] == batch["input_ids"])[trained].all()


def test_a_document_needs_two_tokens() -> None:
    with pytest.raises(UserError, match="--documents 13: .* use at most 12"):
        _ = dataclasses.replace(TINY, documents=13).lengths


# --- training


def test_ours_and_the_baselines_train_the_same(measured: dict[str, Any]) -> None:
    """Mean loss of three optimizer steps: same weights, rows, adapters, loss and optimizer."""
    found = [measured["variants"][name]["loss"] for name in ("ours", "a", "b")]
    assert found[0] > 0 and found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_figures_agree_with_each_other(measured: dict[str, Any]) -> None:
    for name in ("ours", "a", "b"):
        row = measured["variants"][name]
        assert row["tokens_per_second"] * row["ms_per_step"] == pytest.approx(48 * 1e3)
        assert row["tflops"] * row["ms_per_step"] == pytest.approx(measured["step_tflop"] * 1e3)
        ours = measured["variants"]["ours"]["ms_per_step"]
        assert row["ours_is"] == pytest.approx(row["ms_per_step"] / ours)
        assert row["recompilations"] == 0 and row["mfu"] is None and row["peak_gib"] is None


def test_what_was_not_measured_says_so(measured: dict[str, Any]) -> None:
    assert measured["variants"]["c"]["error"] == "not run"
    text = table.training(json.loads(json.dumps(measured)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert "bf16 matrix product: not run" in text


def test_useful_work_leaves_recomputation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "measure", lambda *args: {"error": "not run"})
    found = [
        training.run(dataclasses.replace(TINY, gradient_checkpointing=on), ["ours"], say=lambda line: None)
        for on in (True, False)
    ]
    assert found[0]["step_tflop"] == found[1]["step_tflop"]


def test_a_variant_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(case: Case, variant: training.Variant, state: PartialState, folder: Path) -> dict[str, Any]:
        if variant.two_models:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {**clock().figures(), "peak_gib": 1.0, "loss": 1.0}

    monkeypatch.setattr(training, "_train", train)
    found = training.run(TINY, ["b", "ours"], say=lambda line: None)
    assert found["variants"]["b"] == {"what": "two models", "error": "out of memory", "ours_is": None}
    assert "| b: two models | out of memory | not run |" in table.training(found)
    assert found["variants"]["ours"]["tokens_per_second"] == pytest.approx(48 / 2)


def clock() -> training.StepClock:
    made = training.StepClock(warmup=5, steps=10)
    made.times, made.graphs = [100.0, 103.0, 113.0, 120.0], [7, 7, 8, 9]
    return made


def test_clock_counts_the_steps_after_the_warm_up() -> None:
    made = clock()
    assert made.ends == [5, 8, 11, 15]
    assert made.figures() == {
        "ms_per_step": pytest.approx(2000),
        "ms_of_blocks": pytest.approx([1000, 10000 / 3, 1750]),
        "ms_median": pytest.approx(1750),
        "recompilations": 2,
    }


@pytest.mark.slow
def test_compiled_variants_train_the_same_without_recompilation(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Dynamo and autograd without kernels of their own, whose compiler takes a minute (``test_compiled`` has it)."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *f, backend="", **how: compile(*f, backend="aot_eager", **how))
    case = dataclasses.replace(TINY, compile=True, warmup=2, steps=1)
    found = training.run(case, ["ours", "c"], say=lambda line: None)["variants"]
    for row in found.values():
        assert row["loss"] == pytest.approx(measured["variants"]["ours"]["loss"], rel=1e-4)
        assert row["recompilations"] == 0


# --- the commands


def test_train_prints_a_table_and_one_json_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["train", *ARGUMENTS, "--variants", "ours"]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found["pairs"] == [[1, 2]] and list(found["variants"]) == ["ours"]
    assert {"versions", "device", "date", "commit", "batch", "seq", "step_tflop"} <= found.keys()
    assert any(line.startswith("| ours: this project |") for line in out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "ours,d"], "--variants 'd': unknown; use some of ours,a,b,c"),
        (["--pairs", "[[1,3]]"], "pair 1-3 is not consecutive"),
        (["--fp8"], "--fp8: FP8 products need a Hopper GPU or newer"),
        (["--documents", "9"], "--documents 9: one has at least 2 of a row's 16 tokens; use at most 8"),
    ],
)
def test_mistakes_are_told_in_one_line(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench.main(["train", *ARGUMENTS, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_each_variant_is_a_line_when_it_is_done(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call that is stopped in its second variant leaves the first, and the table holds both calls."""
    path = tmp_path / "new" / "x.jsonl"
    times = iter([100.0, 200.0, KeyboardInterrupt])

    def measure(*args: Any) -> dict[str, Any]:
        if not isinstance(found := next(times), float):
            raise found
        return {**clock().figures(), "ms_per_step": found, "peak_gib": None, "loss": 1.0}

    monkeypatch.setattr(training, "measure", measure)
    assert bench.main(["train", *ARGUMENTS, "--variants", "ours", "--out", str(path)]) == 0
    with pytest.raises(KeyboardInterrupt):
        bench.main(["train", *ARGUMENTS, "--variants", "a,b", "--out", str(path)])
    assert [list(json.loads(line)["variants"]) for line in path.read_text().splitlines()] == [["ours"], ["a"]]
    capsys.readouterr()
    assert bench.main(["table", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    (found,) = json.loads(out[-1])["tables"]
    assert {name: row["ours_is"] for name, row in found["variants"].items()} == {"ours": 1.0, "a": 2.0}
    assert len([line for line in out if line.startswith("| a: ") and "| 2.00 x |" in line]) == 1


@pytest.mark.parametrize("name", results.SAME)
def test_ratios_are_within_one_case_machine_and_code(measured: dict[str, Any], tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.jsonl"
    ours, a = ({**measured, "variants": {name: measured["variants"][name]}} for name in ("ours", "a"))
    path.write_text("\n".join(map(json.dumps, [ours, {**a, name: "another"}, {**ours, "date": "another"}])))
    found = results.read(path)
    assert [list(one["variants"]) for one in found] == [["ours"], ["a"]]
    assert found[1]["variants"]["a"]["ours_is"] is None


def test_the_code_is_part_of_where_figures_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [results.identity(torch.device("cpu"))]
    (tmp_path / "results.py").write_text("changed")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    found.append(results.identity(torch.device("cpu")))
    assert found[0]["machine"] == found[1]["machine"] and found[0]["code"] != found[1]["code"]


@pytest.mark.parametrize("text", ["{", "[]", '{"variants": {}}', "1"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match="line 1: not a JSON object with variants"):
        results.read(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="No such file or directory; give the file"):
        results.read(tmp_path / "y.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        results.appender(tmp_path)


def fake_run(seen: list[Case]) -> Callable[..., dict[str, Any]]:
    def run(case: Case, names: list[str], say: Callable[[str], None]) -> dict[str, Any]:
        seen.append(case)
        rates = {"ours": {"tokens_per_second": 2e6}, names[1]: {"tokens_per_second": 1e6}}
        return {
            "device": "none",
            "case": dataclasses.asdict(case),
            "variants": rates | ({names[1]: {"error": "out of memory"}} if len(seen) > 2 else {}),
        }

    return run


def test_sweep_writes_lines_and_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, drawn: None) -> None:
    seen: list[Case] = []
    monkeypatch.setattr(training, "run", fake_run(seen))
    axes = sweep.Axes(seq=[32, 64], vocab=[128], depth=[0.25, 0.75], tokens=128)
    lines = sweep.run(dataclasses.replace(TINY, layers=8), axes, tmp_path, say=lambda line: None)
    assert [case.size for case in seen] == [(4, 32), (2, 64), (2, 24), (2, 24), (2, 24)]
    assert seen[2].vocab == 128 and [case.pairs for case in seen[3:]] == ["2:8", "6:8"]
    assert [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()] == lines
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    rows = table.sweep(lines).splitlines()
    assert rows[2] == "| seq 32 | 0.50 | 1.00 | 2.00 x |" and rows[-1].endswith("| 0.50 | not run | not run |")


def test_a_sweep_goes_on_where_it_was_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Case] = []
    monkeypatch.setattr(training, "run", fake_run(seen))
    base = dataclasses.replace(TINY, layers=8)
    sweep.run(base, sweep.Axes(seq=[32], vocab=[], depth=[], tokens=128), tmp_path, say=lambda line: None)
    axes = sweep.Axes(seq=[32, 64], vocab=[128], depth=[], tokens=128)
    lines = sweep.run(base, axes, tmp_path, say=lambda line: None)
    assert [case.size for case in seen] == [(4, 32), (2, 64), (2, 24)] and [line["value"] for line in lines] == [
        32,
        64,
        128,
    ]
    with pytest.raises(UserError, match="holds seq 32 of another case; name a new folder"):
        sweep.run(dataclasses.replace(base, rank=2), axes, tmp_path, say=lambda line: None)


def test_head_losses_agree_with_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "free_memory", lambda: None)  # slow beside such small sizes
    found = losses.run(rows=40, width=16, vocab=96, dtype=torch.float32, device=torch.device("cpu"), repeats=1)
    assert list(found["losses"]) == list(losses.LOSSES)
    for name, ways in found["losses"].items():
        assert list(ways) == ["ours", "TRL", "plain chunks"]
        assert ("error" in ways["TRL"]) == ("cross-entropy" in name)
        assert all(way["gradient_error"] < 1e-5 for way in ways.values() if "error" not in way), name
    assert "| cross-entropy | TRL | not supported | not run | not run |" in table.losses(found)
