"""Measures a model run in order, its pairs untuned, and what runs made of them: fidelity and tasks, side by side.

    python scripts/evaluate_run.py runs/demo/resolved_config.yaml runs/demo evaluate.tasks='[seven]' \\
        evaluate.task_data=PATH
    python scripts/evaluate_run.py configs/demo.yaml runs/seed0 runs/seed1 --pool --output runs/both
    accelerate launch --num_processes 8 scripts/evaluate_run.py CONFIG RUN evaluate.tasks='[paper]' ...

A few minutes on a CPU, without a run and without task files:

    python scripts/evaluate_run.py configs/demo.yaml evaluate.tokens=2048

The configuration gives base, held-out text and tasks; each run brings its own plan. Writes evaluation.json,
items.jsonl.gz and the report into each run's folder, or into --output. recipes/evaluation.md lists the tasks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from lp_train.cluster.launch import leave, quieten_libraries, start
from lp_train.config import load_config
from lp_train.errors import UserError, command_line, exit_code, require_package
from lp_train.evaluation.page import plain
from lp_train.evaluation.report import EVALUATIONS
from run_evaluation.pages import add_row, add_to_wandb, refresh
from run_evaluation.tables import compared_fidelity, task_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = command_line("evaluate_run.py", __doc__)
    parser.add_argument("config", help="a YAML file: a run's resolved_config.yaml, or one of configs/")
    parser.add_argument("rest", nargs="*", metavar="run folder | key.path=value")
    parser.add_argument("--output", type=Path, help="where results without a run of their own go")
    parser.add_argument("--pool", action="store_true", help="the runs are seeds of one recipe: also give their mean")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    return exit_code(lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> None:
    require_package("lm_eval", "evaluation", 'run `pip install -e ".[eval]"`')
    from run_evaluation.evaluate import evaluate, write  # --help is there without lm-eval

    config = load_config(options.config, [argument for argument in options.rest if "=" in argument])
    folders = [Path(argument) for argument in options.rest if "=" not in argument]
    output = options.output or Path(config.train["output_dir"] + "-untuned")
    if options.pool and options.output is None:
        raise UserError("--pool: the mean of several runs needs a folder; add --output FOLDER")
    state = start()
    say = print if state.is_main_process else lambda *_: None
    documents = evaluate(config, folders, state, options.pool, say)
    if state.is_main_process:
        targets = [*folders, output][: len(documents)]
        for document, folder in zip(documents, targets, strict=True):
            write(folder, document)  # of all runs before a page of one: what was measured is safe then
        for document, folder in zip(documents, targets, strict=True):
            refresh(folder)
            if folder.absolute().parent.name == EVALUATIONS:
                add_row(folder.absolute().parents[1])
            add_to_wandb(config.track, folder, config.name, document)
        shown = [compared_fidelity(documents)] + [task_table(documents)] * bool(documents[0]["tasks"])
        print("\n" + "\n\n".join(map(plain, shown)) + "\n")
        print("report " + ", ".join(f"{folder}/report.md and report.html" for folder in targets))
    leave(state)


if __name__ == "__main__":
    sys.exit(main())
