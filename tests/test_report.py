"""The report's pages: self-contained, complete where everything was measured, silent where it was not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
import yaml
from eval_files import write_eval_files
from transformers import PreTrainedTokenizerFast

import evaluate_run
import report as report_command
from lp_train import finetune
from lp_train.evaluation import page
from lp_train.evaluation.page import Commands, Plot, Table

HEADINGS = ["Recovery over training", "Memory and speed", "Environment", "To reproduce"]
EVALUATED = ["Tasks", "Drift by layer", "By position in the document", "By domain", "Greedy answers"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """``plain`` only trained; ``deep`` and ``flat`` measured too, on long documents and tasks."""
    place = tmp_path_factory.mktemp("report")
    model = tiny_run.save_model(place / "model", tiny_tokenizer)
    config = tiny_run.write_config(place / "tiny.yaml", model, tiny_run.write_text(place / "text.jsonl"))
    files = write_eval_files(place / "files", items=12)
    long = [{"text": f"{i} " + "The sea and the story of a parser. " * 12} for i in range(6)]
    options = [f"data.eval={tiny_run.write_lines(place / 'long.jsonl', long)}", "train.max_length=128"]
    options += ["train.max_steps=2", f"evaluate.task_data={files}", "evaluate.generation_prompts=3"]
    found = {}
    for name, pairs in {"plain": "2:6", "deep": "2:4", "flat": "0:6"}.items():
        found[name] = place / name
        given = [f"train.output_dir={found[name]}", f"plan.pairs={pairs}", "evaluate.tasks=[seven, wikitext_local]"]
        assert finetune.main([str(config), *given, *options]) == 0
        if name != "plain":
            assert evaluate_run.main([f"{found[name]}/resolved_config.yaml", str(found[name])]) == 0
    return found


def headings(folder: Path) -> list[str]:
    return re.findall(r"^## (.*)$", (folder / "report.md").read_text(), re.MULTILINE)


def test_what_was_not_measured_has_no_section(runs: dict[str, Path]) -> None:
    assert headings(runs["plain"]) == HEADINGS
    assert headings(runs["deep"]) == [HEADINGS[0], *EVALUATED, *HEADINGS[1:]]


def test_the_page_needs_no_other_file_and_holds_what_the_markdown_holds(runs: dict[str, Path]) -> None:
    text, markdown = (runs["deep"] / "report.html").read_text(), (runs["deep"] / "report.md").read_text()
    assert not re.findall(r"(?:src|srcset|href)=\"(?!data:image/png;base64,)", text) and "http" not in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == headings(runs["deep"])
    for file in re.findall(r"]\((plots/.*?)\)", markdown):
        assert (runs["deep"] / file).read_bytes().startswith(b"\x89PNG")
    assert text.count("<picture>") == markdown.count("](plots/") == 6
    kl = json.loads((runs["deep"] / "evaluation.json").read_text())["fidelity"]["paired"]["kl"]
    assert f"{kl:.4f}" in text and f"{kl:.4f}" in markdown


def test_a_report_made_again_is_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    before = (runs["deep"] / "report.html").read_text()
    (runs["deep"] / "report.html").unlink()
    assert report_command.main([str(runs["deep"])]) == 0
    assert (runs["deep"] / "report.html").read_text() == before


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
        "| deep: recovered | 5 |" in printed and "| flat: recovered | 3 |" in printed and "| seven, mean |" in printed
    )
    assert (out / "plots" / "depth.png").exists() and "seven, %" in (out / "report.md").read_text()
    assert report_command.main([str(runs["plain"]), str(runs["flat"]), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "seven" not in printed and "| plain: recovered | 4 |" in printed


def test_mistakes(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert report_command.main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "add --out FOLDER" in refused(str(runs["plain"]), str(runs["deep"]))
    assert "neither report.json nor evaluation.json" in refused(str(tmp_path))
    broken = shutil.copytree(runs["plain"], tmp_path / "broken")
    (broken / "report.json").write_text("{")
    assert "not JSON" in refused(str(broken))


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[[], Plot]:
    def make() -> Plot:
        (tmp_path / "p.png").write_bytes(b"light")
        return Plot("p.png", b"dark", "a <plot>")

    return make


def test_blocks_escape_what_would_be_markup(tmp_path: Path, drawn: Callable[[], Plot]) -> None:
    blocks = ["a < b", Table(("x", "y"), [("<b>|", "1\n2")]), drawn(), Commands("run a && b")]
    text, markdown = page.html("<T>", [("", blocks)], tmp_path), page.markdown("T", [("", blocks)])
    assert "&lt;T&gt;" in text and "a &lt; b" in text and "&lt;b&gt;|" in text and "a &amp;&amp; b" in text
    assert "bGlnaHQ=" in text and "ZGFyaw==" in text  # light, dark
    assert "| &lt;b>\\| | 1<br>2 |" in markdown and "```bash\nrun a && b\n```" in markdown
