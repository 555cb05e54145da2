"""The report of a run, made again from what lies in its folder; of several runs, what sets them apart.

    python scripts/report.py runs/demo
    python scripts/report.py runs/depth25 runs/depth22 runs/depth19 --out runs/compared

For one run: report.md, report.html and plots/ in its folder, and the card beside its weights, with the tasks that
scripts/evaluate_run.py has measured since. For several: a table of all and accuracy against effective depth, in --out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from lp_train.errors import UserError, command_line, exit_code
from run_evaluation.compare import compare_runs
from run_evaluation.pages import refresh


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, writes, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = command_line("report.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="where the comparison of several runs goes")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> None:
    if len(options.runs) > 1 and options.out is None:
        raise UserError("several runs: their comparison needs a folder; add --out FOLDER")
    if options.out and options.out.is_file():
        raise UserError(f"--out {options.out}: a file; name a folder")
    for folder in options.runs:
        refresh(folder)
    if len(options.runs) > 1:
        print(compare_runs(options.runs, options.out))
    print(f"written: {options.out or options.runs[0]}/report.md, report.html, plots/")


if __name__ == "__main__":
    sys.exit(main())
