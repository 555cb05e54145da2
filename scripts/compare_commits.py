"""The demo's training at two commits, on a CPU: are the losses the same, how much faster is it.

    python scripts/compare_commits.py losses 1de65f3
    python scripts/compare_commits.py speed 1de65f3 HEAD --steps 8 --repeats 3

On a CPU, in a minute or two:

    python scripts/compare_commits.py speed HEAD~1 --steps 1 --repeats 1

Each commit runs from a git worktree of its own with the Python that runs this script. ``losses``, in float32, ends
with 1 where one differs by more than 1e-6 of it. ``speed`` alternates between the two, in the demo's dtype. Changes
that are not committed: give ``$(git stash create)`` as NEW. Commits whose built-in text differs: give both the same,
``NEW data.train=FILE data.eval=FILE``. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import positive
from lp_train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6
SETTINGS = ["train.logging_steps=1", "train.eval_strategy=no", "train.save_strategy=no", "evaluate.tokens=1024"]
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

Lines = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses", "speed"))
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both, for example data.train=FILE")
    parser.add_argument("--steps", type=positive, help="default 20; of speed 8, after one that is not counted")
    parser.add_argument("--repeats", type=positive, default=3, help="of speed; default %(default)s")
    options = parser.parse_intermixed_args(arguments)
    if "=" in options.new:
        options.new, options.overrides = "HEAD", [options.new, *options.overrides]
    try:
        commits = [commit_of(options.old), commit_of(options.new)]
        with worktrees(commits) as trees:
            if options.what == "speed":
                return speed(commits, trees, options.steps or 8, options.repeats, *options.overrides)
            return losses(commits, trees, options.steps or 20, *options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def losses(commits: list[str], trees: list[Path], steps: int, *overrides: str) -> int:
    old, new = (losses_of(train(tree, steps, "model.dtype=float32", *overrides)) for tree in trees)
    worst = largest_difference(old, new)
    steps_done = enumerate(zip(old, new, strict=True), 1)
    rows = [f"{step:4d}  {a:.9f}  {b:.9f}  {b / a - 1:+.1e}" for step, (a, b) in steps_done]
    print(f"step  {commits[0][:9]:11s}  {commits[1][:9]:11s}  difference", *rows, sep="\n")
    found = {"commits": commits, "old": old, "new": new, "worst": worst, "tolerance": TOLERANCE}
    print(f"\nlargest relative difference {worst:.2e}\n\n{json.dumps(found)}")
    return exit_code(worst)


def speed(commits: list[str], trees: list[Path], steps: int, repeats: int, *overrides: str) -> int:
    print(f"tokens/s: {commits[0][:9]}, {commits[1][:9]}, ratio")
    pairs = []
    for _ in range(repeats):
        old, new = (tokens_per_second(train(tree, steps + 1, *overrides)) for tree in trees)
        print(f"{old:9.1f} {new:9.1f} {new / old:6.3f}", flush=True)
        pairs.append((old, new))
    ratio = statistics.median(new / old for old, new in pairs)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    found = {"commits": commits, "tokens_per_second": pairs, "ratio": ratio, "steps": steps, "threads": threads}
    print(f"\nmedian ratio {ratio:.3f}\n\n{json.dumps(found)}")
    return 0


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def commit_of(name: str) -> str:
    """The full hash. Raises UserError where there is no such commit."""
    try:
        return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except subprocess.CalledProcessError:
        raise UserError(f"{name}: no commit of this repository; give one that `git log` shows") from None


@contextmanager
def worktrees(commits: list[str]) -> Iterator[list[Path]]:
    """A folder for each commit, gone at the end, also where a time limit ends the call (SIGTERM)."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as parent:
        trees = [Path(parent) / f"{i}-{commit[:9]}" for i, commit in enumerate(commits)]
        try:
            for tree, commit in zip(trees, commits, strict=True):
                git("worktree", "add", "--detach", str(tree), commit)
            yield trees
        finally:
            for tree in filter(Path.exists, trees):
                git("worktree", "remove", "--force", str(tree))


def train(tree: Path, steps: int, *overrides: str) -> Lines:
    """``metrics.jsonl`` of a run of the demo. Raises UserError with the run's own last line where it fails."""
    run = tree / "runs" / "compared"
    command = [sys.executable, "lp_train/finetune.py", "configs/demo.yaml", "--overwrite", f"train.output_dir={run}"]
    command += [*SETTINGS, f"train.max_steps={steps}", f"train.max_steps_float32={steps}", *overrides]
    done = subprocess.run(command, cwd=tree, env=os.environ | ON_CPU, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{tree.name}: the training ended with {done.returncode} ({last}); run it there by hand")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(lines: Lines) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def tokens_per_second(lines: Lines) -> float:
    """Over all steps but the first: every step has as many tokens, so this is the harmonic mean of their rates."""
    return statistics.harmonic_mean([line["tokens_per_second"] for line in lines if "loss" in line][1:])


def largest_difference(old: list[float], new: list[float]) -> float:
    """Relative to ``old``; NaN where a loss is NaN. Raises UserError where the numbers of steps differ."""
    if len(old) != len(new):
        raise UserError(f"{len(old)} and {len(new)} logged losses: must be as many; compare commits whose demos agree")
    return float(np.max(np.abs(np.array(new) - old) / np.abs(old)))


def exit_code(difference: float) -> int:
    return 0 if difference <= TOLERANCE else 1  # NaN too is a difference


if __name__ == "__main__":
    sys.exit(main())
