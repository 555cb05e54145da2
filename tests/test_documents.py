"""README and recipes: their commands run, their links and files exist, their figures are those of stored reports."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import trade_off
from lp_train.finetune import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("recipes/**/*.md"))]
RESULTS = ROOT / "recipes" / "smollm2_135m" / "results"


def commands() -> list[str]:
    """Every finetune command of the documents, continued lines joined, without its comment."""
    found: dict[str, None] = {}
    for document in DOCUMENTS:
        for line in document.read_text().replace("\\\n", " ").splitlines():
            if match := re.match(r"\s*accelerate launch (?:--\S+ )*lp_train/finetune\.py (configs/[^#`]+)", line):
                found[" ".join(match[1].split())] = None
    return list(found)


@pytest.mark.parametrize("command", commands())
def test_every_finetune_command_dry_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    arguments = [a for a in shlex.split(command) if a != "--dry-run"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "effective depth" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    paths = re.findall(r"`((?:lp_train|configs|recipes|scripts|tests)/[\w./]*\w)`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


RECIPE = ROOT / "recipes" / "smollm2_135m" / "README.md"


@pytest.mark.parametrize("depth", [25, 22, 19])
def test_result_tables_are_those_of_the_reports(depth: int) -> None:
    plain = result_row(json.loads((RESULTS / f"depth{depth}.json").read_text()))
    best = trade_off.row(trade_off.read(RESULTS / "best" / f"depth{depth}"))
    assert plain in RECIPE.read_text(), f"{RECIPE} lacks the line\n{plain}"
    for document in (DOCUMENTS[0], RECIPE):
        assert f"| {' | '.join(best)} |" in document.read_text(), f"{document} lacks the line\n{best}"


def result_row(report: dict) -> str:
    """One run as a line of the result table."""
    cells = [
        str(report["effective_depth"]),
        *(f"{report[name]['nll']:.3f}" for name in ("sequential", "paired", "recovered")),
        *(f"{report[name]['kl']:.3f}" for name in ("paired", "recovered")),
        f"{report['recovered']['top1_agreement']:.1%}",
        f"**{report['recovery']['nll']:.0%}**",
        f"**{report['recovery']['kl']:.0%}**",
        f"{report['train']['seconds']:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"
