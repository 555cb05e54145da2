"""Fits the adapters of a configuration's pairs in closed form, without training: minutes on a CPU, no GPU needed.

    python scripts/heal.py configs/smollm2_135m.yaml --rank 64 data.train="/path/*.train.jsonl.xz"
    python scripts/heal.py configs/llama1b.yaml --rank full --tokens 65536 --out runs/llama1b-healed
    accelerate launch lp_train/finetune.py configs/smollm2_135m.yaml lora.r=64 lora.start_from=runs/smollm2_135m-healed
    accelerate launch lp_train/finetune.py configs/smollm2_135m.yaml lora.start_from=heal    # both in one

A minute on a CPU, on text that comes with Python:

    python scripts/heal.py configs/demo.yaml --tokens 4096 evaluate.tokens=2048

Writes adapter/, report.json, report.md and report.html; ``lp_train.load(FOLDER)`` opens the result, and training
starts from it by ``lora.start_from``. The method is described in ``lp_train/pairing/heal.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from transformers import set_seed

from lp_train import models
from lp_train.cluster.launch import quieten_libraries, start
from lp_train.config import Config, load_config
from lp_train.data import data_of
from lp_train.distill.healed import fit
from lp_train.distill.trainer import peak_memory_gib
from lp_train.errors import UserError, command_line, exit_code
from lp_train.evaluation import page, tables
from lp_train.evaluation import report as reports
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.card import write_card
from lp_train.evaluation.fidelity import as_it_is
from lp_train.finetune import build_model, check_model, save_result
from lp_train.pairing import adapters_off
from lp_train.pairing.heal import check_healable
from lp_train.run_folder import check_run_folder, open_run_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, heals, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = command_line("heal.py", __doc__, "lora.target_modules=[down_proj]")
    parser.add_argument("--tokens", type=int, default=65536, help="of data.train that are fitted; fewer are faster")
    parser.add_argument("--rank", help="of the adapters, or full; lora.r when left out")
    parser.add_argument("--out", help="the folder to write; runs/NAME-healed when left out")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in that folder")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    return exit_code(lambda: run(read_config(options), options.tokens, options.overwrite), options.debug)


def read_config(options: argparse.Namespace) -> Config:
    """The configuration with the options in it. The widest matrix rank of a layer is that of the residual stream."""
    overrides = [*options.overrides, "lora.start_from=null"]
    config = load_config(options.config, overrides)
    if config.tune != "lora":
        raise UserError(f"tune {config.tune!r}: the fit is written into adapters; use tune: lora")
    rank = options.rank
    if rank == "full":
        rank = models.load_model_config(config.model).get_text_config().hidden_size
    overrides += [f"lora.r={rank}"] if rank else []
    folder = options.out or f"runs/{config.name}-healed"
    return load_config(options.config, [*overrides, f"train.output_dir={folder}"])


def run(config: Config, tokens: int, overwrite: bool = False) -> dict[str, Any]:
    """Fits, measures and writes. Returns the report."""
    state = start()
    if state.num_processes > 1:
        raise UserError(f"{state.num_processes} processes: one makes the fit; run it without a launcher")
    length = config.train["max_length"]
    if tokens < length:
        raise UserError(f"--tokens {tokens}: less than one row of train.max_length {length}; give at least {length}")
    plan = check_model(config)
    print(f"{config.name}: {config.model.name_or_path}, {plan}", flush=True)
    folder = check_run_folder(config, resume=False, overwrite=overwrite)
    tokenizer = models.load_tokenizer(config.model)
    bench = Bench(config, data_of(config, tokenizer, tokens), tokenizer, state)
    set_seed(config.train["seed"])
    model = build_model(config, plan, state.device)
    check_healable(model)
    open_run_folder(folder, config, state, resume=False)
    fitted = {
        "asked_tokens": tokens,
        "rank": config.lora["r"],
        **fit(model, bench.batches_of(tokens), bench.autocast),
    }
    print(f"fitted on {fitted['tokens']:,} tokens in {fitted['seconds']:.0f} s", flush=True)

    figures = bench.measure(model, {"paired": adapters_off, "recovered": as_it_is})
    report = bench.report(plan, figures) | {"heal": {**fitted, "peak_memory_gib": peak_memory_gib()}}
    save_result(model, tokenizer, config, folder, bench.state)
    reports.write(folder / "report.json", reports.as_json(report))
    reports.write_document(folder, report)
    write_card(folder, report, config.model.name_or_path)
    print(f"\n{page.plain(tables.fidelity_table(report))}\n\n{tables.sentence(report)}\n")
    print(f"report {folder}/report.md and report.html, weights {folder}/adapter/")
    return report


if __name__ == "__main__":
    sys.exit(main())
