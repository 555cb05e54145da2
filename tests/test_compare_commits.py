"""scripts/compare_commits.py: what is read from two runs, and what it says of them. The runs themselves are faked."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compare_commits
from compare_commits import commit_of, exit_code, largest_difference, losses_of, tokens_per_second, train, worktrees
from lp_train.errors import UserError

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 0.5, "tokens_per_second": 1.0},
    {"step": 2, "loss": 0.25, "tokens_per_second": 100.0},
    {"step": 3, "loss": 0.2, "tokens_per_second": 300.0},
    {"step": 3, "train_loss": 0.3, "train_runtime": 9.0},
]


def test_losses_and_speed_of_a_run() -> None:
    assert losses_of(LINES) == [0.5, 0.25, 0.2]
    assert tokens_per_second(LINES) == pytest.approx(
        2 / (1 / 100 + 1 / 300)
    )  # two steps of as many tokens, not the first


@pytest.mark.parametrize(
    ("new", "difference", "code"),
    [
        ([0.5, 0.25], 0.0, 0),
        ([0.5, 0.25 * (1 + 9e-7)], 9e-7, 0),
        ([0.5 * (1 - 2e-6), 0.25], 2e-6, 1),
        ([float("nan"), 0.25], float("nan"), 1),
        ([0.5, float("nan")], float("nan"), 1),
    ],
)
def test_the_largest_difference_decides(new: list[float], difference: float, code: int) -> None:
    found = largest_difference([0.5, 0.25], new)
    assert found == pytest.approx(difference, rel=1e-6, nan_ok=True) and exit_code(found) == code


def test_runs_of_different_length_are_not_compared() -> None:
    with pytest.raises(UserError, match="2 and 1 logged losses"):
        largest_difference([0.5, 0.25], [0.5])


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two commits of a program that writes metrics.jsonl: the second has other losses and twice the speed."""
    folder = tmp_path / "repository"
    (folder / "lp_train").mkdir(parents=True)
    (folder / "configs").mkdir()
    (folder / "configs" / "demo.yaml").touch()
    monkeypatch.setattr(compare_commits, "ROOT", folder)
    compare_commits.git("init", "--quiet")
    commits = []
    for loss, rate in ((0.5, 10.0), (0.6, 20.0)):
        lines = [{"step": step, "loss": loss, "tokens_per_second": rate} for step in (1, 2)]
        (folder / "lp_train" / "finetune.py").write_text(PROGRAM.format(text="\n".join(map(json.dumps, lines))))
        compare_commits.git("add", ".")
        compare_commits.git("-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "-m", "m")
        commits.append(compare_commits.git("rev-parse", "HEAD"))
    return commits


PROGRAM = """import pathlib, sys
run = pathlib.Path(next(a for a in sys.argv if a.startswith("train.output_dir=")).split("=")[1])
run.mkdir(parents=True)
(run / "metrics.jsonl").write_text({text!r})
"""


def test_losses_of_two_commits(repository: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_commits.main(["losses", repository[0], "--steps", "2"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["commits"], found["old"], found["new"]) == (repository, [0.5, 0.5], [0.6, 0.6])
    assert found["worst"] == pytest.approx(0.2)
    assert compare_commits.main(["losses", repository[1]]) == 0


def test_speed_of_two_commits(repository: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def faked(tree: Path, *rest: Any) -> list[dict[str, Any]]:
        seen.append((tree.name[:1], *rest))
        return LINES

    monkeypatch.setattr(compare_commits, "train", faked)
    assert compare_commits.main(["speed", *repository, "--steps", "2", "--repeats", "2"]) == 0
    assert seen == [("0", 3), ("1", 3)] * 2  # alternating, one step more than are counted
    text = "data.train=text.jsonl"
    for order in ([repository[0], "HEAD", "--steps", "2", text], [repository[0], text, "--steps", "2"]):
        seen.clear()
        assert compare_commits.main(["speed", *order, "--repeats", "1"]) == 0
        assert seen == [("0", 3, text), ("1", 3, text)]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_worktrees_are_gone_afterwards(
    repository: list[str], number: signal.Signals, raised: type[BaseException]
) -> None:
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    try:
        with pytest.raises(raised), worktrees(repository) as trees:
            assert ["0.5" in (tree / "lp_train" / "finetune.py").read_text() for tree in trees] == [True, False]
            signal.raise_signal(number)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert not any(tree.exists() for tree in trees)
    assert len(compare_commits.git("worktree", "list").splitlines()) == 1


def test_mistakes_are_told_in_one_line(repository: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing: no commit of this repository"):
        commit_of("nothing")
    (tmp_path / "lp_train").mkdir()
    (tmp_path / "lp_train" / "finetune.py").write_text("raise SystemExit('error: no such model')")
    with pytest.raises(UserError, match="the training ended with 1 .error: no such model."):
        train(tmp_path, 1)


def test_help_needs_nothing() -> None:
    script = Path(__file__).parents[1] / "scripts" / "compare_commits.py"
    subprocess.run([sys.executable, str(script), "--help"], check=True, capture_output=True)
