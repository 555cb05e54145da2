"""The report's pages: self-contained, complete where everything was measured, silent where it was not."""

import html
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
import yaml
from eval_files import write_eval_files
from transformers import PreTrainedTokenizerFast

import evaluate_run
import report as report_command
from lp_train import finetune, track
from lp_train.config import TrackConfig, load_config
from lp_train.evaluation import page
from lp_train.evaluation import report as reports
from lp_train.evaluation.page import Table, literal
from run_evaluation.pages import add_to_wandb
from run_evaluation.statistics import compare
from run_evaluation.tables import compared_fidelity, task_table

ROOT = Path(__file__).parents[1]
TEXT = ["By position in the document", "Drift by layer"]
REST = ["Memory and speed", "Environment", "To reproduce"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """``plain`` only trained; ``deep`` and ``flat`` measured too, on long documents and tasks."""
    place = tmp_path_factory.mktemp("a report")  # a path that a command must quote
    model = tiny_run.save_model(place / "model", tiny_tokenizer)
    config = tiny_run.write_config(place / "tiny.yaml", model, tiny_run.write_text(place / "text.jsonl"))
    files = write_eval_files(place / "files", items=12)
    long = [{"text": f"{i} " + "The sea and the story of a parser. " * 12} for i in range(6)]
    options = [f"data.eval={tiny_run.write_lines(place / 'long.jsonl', long)}", "train.max_length=128"]
    options += ["evaluate.tasks=[seven, wikitext_local, mmlu_local]", "train.max_steps=2"]
    options += [f"evaluate.task_data={files}", "evaluate.generation_prompts=3"]
    found = {}
    for name, pairs in {"plain": "2:6", "deep": "2:4", "flat": "0:6"}.items():
        found[name] = place / name
        given = [f"train.output_dir={found[name]}", f"plan.pairs={pairs}"]
        assert finetune.main([str(config), *given, *options]) == 0
        if name != "plain":
            measured = [f"{found[name]}/resolved_config.yaml", str(found[name]), "evaluate.num_fewshot=2"]
            assert evaluate_run.main([*measured, "evaluate.task_limit=10"]) == 0
    return found


def headings(folder: Path) -> list[str]:
    return re.findall(r"^## (.*)$", (folder / "report.md").read_text(), re.MULTILINE)


def test_what_was_not_measured_has_no_section(runs: dict[str, Path]) -> None:
    assert headings(runs["plain"]) == ["Recovery over training", *TEXT, *REST]
    assert headings(runs["deep"]) == ["Recovery over training", "Tasks", "Greedy answers", *TEXT, *REST]


def test_the_page_needs_no_other_file_and_holds_what_the_markdown_holds(runs: dict[str, Path]) -> None:
    text, markdown = (runs["deep"] / "report.html").read_text(), (runs["deep"] / "report.md").read_text()
    assert not re.findall(r"\b(?:src|srcset|href)=\"(?!#|data:)|url\((?!#)|@import", text) and "http" not in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == headings(runs["deep"])
    for file in re.findall(r"]\((plots/.*?)\)", markdown):
        assert (runs["deep"] / file).read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png") == markdown.count("](plots/") == 4 and "╭" in text
    kl = json.loads((runs["deep"] / "evaluation.json").read_text())["fidelity"]["paired"]["kl"]
    assert f"{kl:.4f}" in text and f"{kl:.4f}" in markdown


def test_the_page_says_where_examples_come_from(runs: dict[str, Path]) -> None:
    with_examples = "hellaswag, arc_easy, arc_challenge, piqa, openbookqa, lambada"
    for page_of_run in ("report.md", "report.html"):
        text = (runs["deep"] / page_of_run).read_text()
        assert f"Examples of {with_examples}: the evaluated file, without the item itself." in text
        assert "Examples of mmlu: development items of the item's subject." in html.unescape(text)


def test_the_commands_to_reproduce_are_understood(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the program and by the configuration; what an evaluation's command line had set is set again."""
    monkeypatch.chdir(ROOT)
    text, again = (runs["deep"] / "report.md").read_text(), f"{runs['deep']}-again"
    block = re.search(r"## To reproduce\n\n```bash\n(.*?)\n```\n", text, re.DOTALL)
    train, measure, page_again = (shlex.split(line) for line in block[1].splitlines())
    assert train[:3] == ["accelerate", "launch", "lp_train/finetune.py"] and train[4] == f"train.output_dir={again}"
    assert finetune.main([*train[3:], "--dry-run"]) == 0 and "effective depth" in capsys.readouterr().out
    assert measure[:2] == ["python", "scripts/evaluate_run.py"] and measure[3] == again
    evaluation = json.loads((runs["deep"] / "evaluation.json").read_text())
    assert asdict(load_config(measure[2], measure[4:]).evaluate) == evaluation["evaluate"]
    assert page_again == ["python", "scripts/report.py", again]
    assert all(Path(program).exists() for program in (train[2], measure[1], page_again[1]))


def test_a_report_made_again_is_the_same(runs: dict[str, Path], drawn: None) -> None:
    pages = []
    for _ in range(2):
        (runs["deep"] / "report.html").unlink()
        assert report_command.main([str(runs["deep"])]) == 0
        pages.append((runs["deep"] / "report.html").read_text())
    assert pages[0] == pages[1]
    assert all(path.stat().st_size > 10_000 for path in (runs["deep"] / "plots").iterdir())


def test_the_card_has_the_tasks_in_the_hubs_format(runs: dict[str, Path]) -> None:
    head = yaml.safe_load((runs["deep"] / "adapter" / "README.md").read_text().split("---")[1])
    tasks = json.loads((runs["deep"] / "evaluation.json").read_text())["tasks"]
    found = {r["dataset"]["type"]: r["metrics"][0]["value"] for r in head["model-index"][0]["results"]}
    for name, task in tasks.items():
        assert found[name] == task["results"]["recovered"][task["metric"]]


def test_several_runs_side_by_side(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compared"
    assert report_command.main([str(runs["deep"]), str(runs["flat"]), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "| recovered deep | 5 |" in printed and "| recovered flat | 3 |" in printed and "| seven mean of 7" in printed
    )
    assert (out / "plots" / "depth.png").exists() and "seven, %" in (out / "report.md").read_text()
    assert report_command.main([str(runs["plain"]), str(runs["flat"]), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "seven" not in printed and "| recovered plain | 4 |" in printed


def test_each_original_has_its_row_and_the_control_stays() -> None:
    def run(name: str, nll: float) -> dict[str, Any]:
        f = {"nll": nll, "ppl": 9.0, "kl": 0.0, "top1_agreement": 1.0}
        return {
            "name": name,
            "plan": {"num_layers": 6},
            "effective_depth": 4,
            "fidelity": {"sequential": f, "paired": f},
        }

    control = {"nll": 2.0, "ppl": 9.0, "kl": 0.0, "top1_agreement": 1.0}
    shown = compared_fidelity([{**run("a", 2.5), "control": control}, run("b", 2.5), run("c", 3.0)]).rows
    assert [row[0].replace("\n", " ") for row in shown] == [
        "original",
        "untuned pairs a",
        "control (not paired) a",
        "untuned pairs b",
        "original c",
        "untuned pairs c",
    ]


def test_a_tracked_run_gets_later_tables(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    begun: dict[str, Any] = {}
    fake = SimpleNamespace(run=SimpleNamespace(summary={}), finish=lambda: None, Settings=dict, Error=OSError)
    fake.init, fake.define_metric = (lambda **options: begun.update(options)), (lambda *names, **options: None)
    fake.Table, fake.Image, fake.log = (lambda columns, data: (columns, data)), str, logged.update
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: name)
    document = json.loads((runs["deep"] / "evaluation.json").read_text())
    add_to_wandb(TrackConfig(wandb="offline"), runs["deep"], "deep", document)
    assert not logged  # this run was not tracked
    folder = shutil.copytree(runs["deep"], tmp_path / "tracked")
    (folder / "wandb_id").write_text("abc")
    add_to_wandb(TrackConfig(wandb="offline"), folder, "deep", document)
    assert (begun["id"], begun["resume"]) == ("abc", "allow") and logged.keys() >= {
        "tables/tasks",
        "tables/answers",
        "plots/tasks",
    }
    assert fake.run.summary["recovered/kl"] == document["fidelity"]["recovered"]["kl"]


def test_files_copied_to_a_machine_name_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LP_COMMIT", "abc1234")
    assert reports.commit() == "abc1234"


def test_mistakes(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert report_command.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "add --out FOLDER" in refused(str(runs["plain"]), str(runs["deep"]))
    assert "neither report.json nor evaluation.json" in refused(str(tmp_path))
    broken = shutil.copytree(runs["plain"], tmp_path / "broken")
    (broken / "report.json").write_text("{")
    assert "not JSON" in refused(str(broken))


def test_foreign_text_is_no_markup(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "p.png").write_bytes(b"drawn")
    foreign = "<b> & **bold** | `code` [link](http://x)\n# line"
    table = Table(("x", "y", "z"), [("a", literal(foreign), "1\n2")], numbers=2)
    text = page.html("<T>", f"{literal(foreign)}\n\n{table}\n\n![a plot](plots/p.png)\n", tmp_path)
    assert text.count("&lt;b&gt; &amp; **bold** | `code` [link](http://x)") == 2 and "&lt;T&gt;" in text
    assert '<img src="data:image/png;base64,ZHJhd24=" alt="a plot" />' in text
    assert "1<br><small>2</small></td>" in text
    assert page.plain(table).endswith("| 1 2 |")


@pytest.mark.parametrize(
    ("original", "other", "cell"),
    [
        ([1, 1, 1, 0] * 50, [1, 1, 0, 0] * 50, "50.0\n−25.0 [−31.0, −19.0]"),
        ([1, 0] * 9, [0, 1] * 9, "50.0\n+0.0 ["),
        ([1], [0], "0.0\n"),
    ],
)
def test_a_difference_inside_its_error_is_shown_as_such(original: list[int], other: list[int], cell: str) -> None:
    comparison = compare(np.array(original), np.array(other), chance=0.25).as_dict()
    task = {"items": len(other), "num_fewshot": 0, "metric": "acc", "chance": 0.25, "unit": "share"}
    document = {
        "plan": {"num_layers": 6},
        "effective_depth": 5,
        "fidelity": {"sequential": {}, "paired": {}},
        "tasks": {"t": {**task, "comparisons": {"paired": comparison}}},
        "groups": {},
    }
    _, shown, found, _ = json.loads(reports.as_json({"rows": task_table([document]).rows}))["rows"][0]
    assert found.startswith(cell) and found.endswith("n.s.") == (not comparison["differs"])
    assert comparison["differs"] == (len(other) == 200)
