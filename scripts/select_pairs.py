"""Shows what pairing costs at every position and length of a model, and chooses pairs, before any training.

    python scripts/select_pairs.py configs/smollm2_135m.yaml --sweep --greedy 11 --scores
    python scripts/select_pairs.py configs/smollm2_135m.yaml --sweep --compare plan.algebra=par
    accelerate launch --num_processes 8 scripts/select_pairs.py configs/llama8b.yaml --greedy 'depth<=0.75'

On two CPU cores, ten minutes at most:

    python scripts/select_pairs.py configs/demo.yaml --sweep --tokens 1024
    python scripts/select_pairs.py configs/demo.yaml --scores --tokens 512

Base, data and algebra are the configuration's; its plan is not looked at. The text is data.calibration, else a share of
data.train's documents by hash, never evaluation text: 65,536 tokens on a GPU, 2,048 on a CPU, or --tokens. Figures are
kept by model, text and versions in the program's cache; a stopped sweep goes on. Tables and plots go to
<train.output_dir>-selection/, or to --output. recipes/selection.md explains them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from accelerate import PartialState

from lp_train import models
from lp_train.cluster.launch import leave, quieten_libraries, start
from lp_train.config import CALIBRATION_FRACTION, Config, load_config
from lp_train.data import data_of
from lp_train.errors import UserError, command_line, exit_code
from lp_train.evaluation.page import Table, plain
from lp_train.finetune import check_base
from lp_train.pairing import AutoPairs
from lp_train.selection.calibration import Calibration, default_tokens
from lp_train.selection.choose import calibrate
from lp_train.selection.greedy import greedy
from pair_analysis import plots
from pair_analysis import report as reports
from pair_analysis.compare import CPU_SAMPLE, compare
from pair_analysis.interventions import interventions
from pair_analysis.scores import rank_correlations, scores
from pair_analysis.sweep import Sweep, sweep

Add = Callable[..., None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = command_line("select_pairs.py", __doc__, "plan.algebra=par")
    parser.add_argument("--sweep", action="store_true", help="every window of contiguous pairs: heat map and best ones")
    parser.add_argument("--greedy", metavar="N", help="add the cheapest pair N times; also loss<=0.1 or depth<=0.7")
    parser.add_argument("--scores", action="store_true", help="cheap scores, and how well they predict the sweep")
    parser.add_argument(
        "--interventions", action="store_true", help="windows reversed, dropped, merged, parallel, paired"
    )
    parser.add_argument("--compare", action="store_true", help="time the sweep against windows from scratch")
    parser.add_argument("--tokens", type=int, help="calibration tokens")
    parser.add_argument("--output", type=Path, help="where tables and plots go")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    return exit_code(lambda: run(options), options.debug)


def run(options: argparse.Namespace) -> None:
    if not any((options.sweep, options.greedy, options.scores, options.interventions, options.compare)):
        raise UserError("nothing to do: give --sweep, --greedy N, --scores, --interventions or --compare")
    if options.tokens is not None and options.tokens < 2:
        raise UserError(f"--tokens {options.tokens}: must be at least 2, for example 2048")
    wanted = AutoPairs.parse(f"auto:{options.greedy}") if options.greedy else None
    config = load_config(options.config, options.overrides)
    state = start()
    layers = check_base(config)
    if wanted is not None:
        wanted.count(layers)
    say = print if state.is_main_process else lambda *_, **__: None
    calibration = load(config, options.tokens or default_tokens(state.device), state, say)
    report = reports.Report(options.output or Path(config.train["output_dir"] + "-selection"), calibration.about)

    def add(name: str, title: str, table: Table, figures: Any, **pictures: Any) -> None:
        if state.is_main_process:
            report.add(name, title, table, figures, pictures)
        say(f"\n{title}\n\n{plain(table)}\n", flush=True)

    measure(calibration, wanted, options, add)
    folder = report.folder
    say(f"report {folder / reports.PAGE}, plots {folder}/plots/, figures {folder / reports.FIGURES}")
    leave(state)


def load(config: Config, tokens: int, state: PartialState, say: Callable[..., Any]) -> Calibration:
    """The base and its calibration rows. Where the configuration sets no text apart, a share of the training text."""
    data, tokenizer = config.data, models.load_tokenizer(config.model)
    if data.calibration is None and not data.calibration_fraction:
        with_share = dataclasses.replace(data, calibration_fraction=CALIBRATION_FRACTION)
        config = dataclasses.replace(config, data=with_share)
        say(
            f"calibration text: {CALIBRATION_FRACTION:.0%} of data.train's documents; a run of this configuration "
            f"trains on them too, unless it has data.calibration_fraction {CALIBRATION_FRACTION}"
        )
    length = config.train["max_length"]
    with state.main_process_first():
        found = data_of(config, tokenizer, length, length, calibration_tokens=tokens)  # of the others none is used
    assert found.calibration is not None
    calibration = calibrate(config, found.calibration, tokenizer, state)
    where = f"{state.num_processes} x {state.device.type} in {calibration.about['dtype']}"
    asked = "" if calibration.tokens > tokens // 2 else f" ({tokens:,} were asked for)"
    say(f"{calibration.tokens:,} predicted tokens in {len(found.calibration)} rows{asked}, {where}", flush=True)
    return calibration


def measure(calibration: Calibration, wanted: AutoPairs | None, options: argparse.Namespace, add: Add) -> None:
    swept: Sweep | None = None
    if options.sweep or options.scores:
        started = time.perf_counter()
        swept = sweep(calibration)
        if calibration.state.is_main_process:
            print(f"{len(swept.costs)} windows in {time.perf_counter() - started:.0f} s")
        table = reports.sweep_table(swept)
        add("sweep", "Windows of contiguous pairs", table, swept.as_dict(), heat_map=lambda: plots.heat_map(swept))
    if wanted is not None:
        path = greedy(calibration, wanted)
        steps, table = [dataclasses.asdict(step) for step in path], reports.greedy_table(path, calibration.num_layers)
        add("greedy", "One pair after the other", table, steps, greedy=lambda: plots.path(path, swept))
    if options.scores and swept:
        found = scores(calibration)
        correlations = rank_correlations(found, swept)
        both = {"scores": found, "rank_correlations": correlations}
        add("scores", "Cheap scores of a pair", reports.score_table(correlations), both)
    if options.interventions:
        grids = interventions(calibration)
        cells = {kind: [[*place, nll] for place, nll in grid.items()] for kind, grid in grids.items()}
        table = reports.intervention_table(grids)
        draw = {"interventions": lambda: plots.intervention_map(grids)}
        add("interventions", "The cheapest window of each kind and length", table, cells, **draw)
    if options.compare:
        result = compare(calibration, CPU_SAMPLE if calibration.state.device.type == "cpu" else None)
        title = f"The sweep against windows from scratch ({result['sampled']} of {result['windows']} run)"
        add("compare", title, reports.compare_table(result), result)


if __name__ == "__main__":
    sys.exit(main())
