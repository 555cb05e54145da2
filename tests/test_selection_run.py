"""Runs that choose their pairs, and the command that shows what pairs cost, on a tiny model on disk."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from launched import PATHS, ROOT, ends, start
from tiny_run import save_model, write_config, write_text
from transformers import PreTrainedTokenizerFast

import select_pairs
from lp_train import finetune
from lp_train.config import CALIBRATION_FRACTION, load_config
from lp_train.dry_run import plan_or_stand_in


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """model/, text.jsonl and tiny.yaml, of which a tenth of the documents is for choosing."""
    folder = tmp_path_factory.mktemp("selection")
    text = write_text(folder / "text.jsonl", 160)
    write_config(folder / "tiny.yaml", save_model(folder / "model", tiny_tokenizer), text)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LP_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def select(place: Path, output: Path, *arguments: str, code: int = 0) -> None:
    given = [str(place / "tiny.yaml"), "data.calibration_fraction=0.1", "--output", str(output), *arguments]
    assert select_pairs.main(given) == code


def sections(output: Path) -> dict[str, Any]:
    return json.loads((output / "selection.json").read_text())["sections"]


def train(place: Path, output: Path, *options: str, config: Path | None = None) -> dict[str, Any]:
    """A run of one step; the configuration that it wrote."""
    given = [f"train.output_dir={output}", "train.max_steps=1", *options]
    assert finetune.main([str(config or place / "tiny.yaml"), *given]) == 0
    return yaml.safe_load((output / "resolved_config.yaml").read_text())


def test_a_run_chooses_its_pairs_and_writes_them_down(
    place: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train(place, tmp_path / "run", "plan.pairs=auto:2", "data.calibration_fraction=0.1")
    printed = capsys.readouterr().out
    select(place, tmp_path / "out", "--greedy", "2")
    firsts = [step["first"] for step in sections(tmp_path / "out")["greedy"]["figures"]]
    pairs = sorted([first, first + 1] for first in firsts)
    assert config["plan"] == {"pairs": pairs, "algebra": "lp", "kind": "pair", "remove": None}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["plan"]["pairs"] == pairs
    assert re.search(
        r"auto:2: 2 pairs \(.*\), depth 6 -> 4, KL \d\.\d+ nats per token there; kept in .*selection", printed
    )
    select(place, tmp_path / "out", "--greedy", "depth<=0.67", "train.seed=1")
    assert [step["first"] for step in sections(tmp_path / "out")["greedy"]["figures"]] == firsts  # for every seed
    assert len(list(cache.glob("selection/*/greedy.json"))) == 1  # no second measurement
    # the written configuration is the same run: it leaves the same text out and chooses nothing
    again = train(place, tmp_path / "again", config=tmp_path / "run" / "resolved_config.yaml")
    assert again["plan"] == config["plan"] and "choosing" not in capsys.readouterr().out
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "again")]
    assert json.loads(lines[0][0])["loss"] == json.loads(lines[1][0])["loss"]


def test_a_choice_keeps_text_apart_where_none_is_given(place: Path) -> None:
    def fraction(*options: str) -> float:
        return load_config(place / "tiny.yaml", options).data.calibration_fraction

    assert fraction() == 0
    assert fraction("plan.pairs=auto:loss<=0.1") == CALIBRATION_FRACTION
    assert fraction("plan.pairs=auto:2", "data.calibration_fraction=0.3") == 0.3
    assert fraction("plan.pairs=auto:2", "data.calibration=x.jsonl") == 0


@pytest.mark.parametrize(
    ("pairs", "drawn", "says"),
    [
        ("auto:2", [(1, 2), (3, 4)], "note: plan.pairs 'auto:2': chosen when the run starts; drawn are"),
        ("auto:depth<=0.5", [(0, 1), (2, 3), (4, 5)], "chosen when the run starts; drawn are"),
        ("auto:loss<=0.1", [(2, 3)], "chosen when the run starts; how many the KL decides, 1 stand here; drawn are"),
        ("2:6", [(2, 3), (4, 5)], ""),
    ],
)
def test_a_dry_run_says_that_pairs_will_be_chosen(
    place: Path, pairs: str, drawn: list[Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_or_stand_in(load_config(place / "tiny.yaml", [f"plan.pairs={pairs}"]), 6)
    assert list(plan.pairs) == drawn
    printed = capsys.readouterr().out
    assert says in printed if says else not printed


def test_all_of_it_in_one_command(place: Path, tmp_path: Path, drawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    select(
        place, out, "--sweep", "--greedy", "loss<=100", "--scores", "--interventions", "--compare", "--tokens", "300"
    )
    found, page, printed = sections(out), (out / "selection.md").read_text(), capsys.readouterr().out
    assert list(found) == ["sweep", "greedy", "scores", "interventions", "compare"]
    assert len(found["sweep"]["figures"]["windows"]) == 9
    assert set(found["scores"]["figures"]["rank_correlations"]) == {"reaction", "error", "cosine", "first", "second"}
    assert found["compare"]["figures"]["largest_difference"] < 1e-5
    for name in ("heat_map", "greedy", "interventions"):
        assert f"(plots/{name}.png)" in page
        assert (out / "plots" / f"{name}.png").stat().st_size > 10_000
    assert "| pairs | depth | best window |" in printed and "| pairs | depth | best window |" in page
    best = {w["pairs"]: w for w in sorted(found["sweep"]["figures"]["windows"], key=lambda w: -w["kl"])}[2]
    window = f"{best['start']}:{best['start'] + 4}"
    gap = best["nll"] - found["sweep"]["figures"]["original_nll"]
    assert f"| 2 | 4 | {window} | {gap:.4f} | {best['kl']:.4f} |" in page


def test_a_later_call_adds_to_the_page_unless_the_text_is_another(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    select(place, out, "--greedy", "1")
    select(place, out, "--interventions")
    assert list(sections(out)) == ["greedy", "interventions"]
    select(place, out, "--greedy", "1", "--tokens", "200")
    assert list(sections(out)) == ["greedy"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to do: give --sweep, --greedy N, --scores"),
        (["--greedy", "4"], "plan.pairs 'auto:4': 6 layers make 3 pairs at most; give auto:3 or less"),
        (["--greedy", "most"], "plan.pairs 'auto:most': not understood; give auto:8"),
        (["--sweep", "data.calibration_fraction=0.000001"], "no document of data.train has its hash in this share"),
        (["--sweep", "--tokens", "0"], "--tokens 0: must be at least 2"),
        (
            ["--sweep", "data.calibration={text}"],
            "data.calibration: no trained token to choose pairs by; give documents",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    place: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello there."}]}))
    given = [argument.replace("{text}", str(tmp_path / "chat.jsonl")) for argument in arguments]
    select(place, tmp_path / "out", *given, code=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_model_is_left_alone(
    place: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", save_model(tmp_path / "other", tiny_tokenizer, seed=1)
    select(place, out, "--greedy", "1")
    before = (out / "selection.json").read_text()
    select(place, out, "--greedy", "1", f"model.name_or_path={other}", code=2)
    assert "selection.json: made for another model" in capsys.readouterr().err
    assert (out / "selection.json").read_text() == before


def launch_two(program: str, *arguments: str, cache: Path) -> str:
    """What the program prints on two CPU processes that know of each other."""
    codes, output = ends(start([str(ROOT / program), *arguments], 2, LP_TRAIN_CACHE=str(cache), PYTHONPATH=PATHS))
    assert codes == [0, 0], output
    return output


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = ("--sweep", "--greedy", "2")
    select(place, one, *wanted)
    given = (str(place / "tiny.yaml"), "data.calibration_fraction=0.1", "--output", str(two), *wanted)
    assert "2 x cpu in float32" in launch_two("scripts/select_pairs.py", *given, cache=tmp_path / "theirs")
    costs = [[w["kl"] for w in sections(folder)["sweep"]["figures"]["windows"]] for folder in (one, two)]
    assert costs[0] == pytest.approx(costs[1], abs=1e-9)
    firsts = [[step["first"] for step in sections(folder)["greedy"]["figures"]] for folder in (one, two)]
    assert firsts[0] == firsts[1]


@pytest.mark.slow
def test_two_processes_train_on_the_same_chosen_pairs(place: Path, tmp_path: Path) -> None:
    given = (
        f"train.output_dir={tmp_path}/run",
        "plan.pairs=auto:2",
        "train.max_steps=1",
        "train.global_batch_tokens=256",
    )
    launch_two("lp_train/finetune.py", str(place / "tiny.yaml"), *given, cache=tmp_path / "theirs")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["environment"]["num_processes"] == 2 and len(report["plan"]["pairs"]) == 2
