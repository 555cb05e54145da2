"""What a recipe takes and gains: COMPUTED by the rules of --dry-run, MEASURED where recipes/benchmarks has its shape.

Training times are FLOPs divided by what an H200's products gave in the recorded training step whose FLOPs per token are
nearest; loading, evaluation and communication come on top. Nothing runs here but arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks import infer_table
from benchmarks.infer import SHAPES
from benchmarks.many_gpus import in_page
from benchmarks.results import beyond_the_plain_step
from benchmarks.table import markdown
from doctor_plan import spoken
from lp_train.bench.flops import forward_costs, step_flops
from lp_train.bench.memory import GIB, memory_gib
from lp_train.bench.shapes import build_on_meta
from lp_train.config import Config, load_config
from lp_train.distill.arguments import split_of
from lp_train.distill.compiled import choose_engine
from lp_train.dry_run import count_steps, plan_or_stand_in, read_model_config
from lp_train.errors import UserError
from lp_train.models import resolve_dtype
from lp_train.pairing import plan_of

RESULTS = Path(__file__).parents[2] / "recipes" / "benchmarks" / "results"
TRAINING = "train_h200.jsonl"
GPUS = 8
MARKS = ("<!-- tables of scripts/bench.py expect -->\n", "<!-- end of the tables -->")

Row = tuple[str, str, str, str]  # step, memory in GiB, time, where both come from


def rows(config: Config) -> list[Row]:
    """Training on one GPU and on several, decoding; then what was measured on this shape.

    Raises:
        UserError: a run of epochs, a plan or a batch that does not fit, a model that cannot be reached.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # that the model's own files cannot be reached
        model_config = read_model_config(config.model)[0].get_text_config()
        plan = plan_or_stand_in(config, model_config.num_hidden_layers)
    model = build_on_meta(model_config, plan, config, resolve_dtype(config.model.dtype))
    if (steps := count_steps(config, model.dtype, None)) is None:
        raise UserError("train.max_steps: missing, and epochs depend on the text; give it, for example 610")
    length, tokens = config.train["max_length"], steps * config.train["global_batch_tokens"]
    flops = step_flops(model, config, [length]).total(1, 1)
    engine = choose_engine(config, model, model.dtype, torch.device("cuda"), triton=True)
    shape = next((name for name, (file, _) in SHAPES.items() if config.model.name_or_path.endswith(file)), None)
    steps_recorded = recorded_steps()
    plain = [step for step in steps_recorded if not beyond_the_plain_step(step)]
    near = min(plain, key=lambda step: abs(math.log(step["flops_per_token"] / flops)))
    rate = near["variants"]["ours"]["of_matmul"] * near["matmul_tflops"] * 1e12
    found = []
    for gpus in (1, GPUS):
        most = config.train["global_batch_tokens"] // length // gpus
        held = min(config.train.get("per_device_train_batch_size", 1), most)
        config.train["per_device_train_batch_size"] = held
        need = sum(memory_gib(model, config, engine, split_of(config, gpus)[0]).values())
        took = spoken(flops * tokens / rate / gpus)
        source = f"{flops / 1e9:.2f} GFLOPs a token at the {rate / 1e12:.0f} TFLOP/s of {near['case']['shape']}'s step"
        where = "one H200" if gpus == 1 else f"{gpus} H200 by DDP"
        step = f"train on {tokens / 1e6:.1f} M tokens, {where}, {held} rows each"
        found.append((step, f"{need:.1f}", took, f"computed: {source}" if gpus == 1 else "computed likewise"))
    costs = forward_costs(model, length)["paired"]
    weights, cache = costs["parameters"] * model.dtype.itemsize / GIB, 1000 * costs["kv_bytes_per_token"] / GIB
    found.append(
        ("decode, in order or fused", f"{weights:.1f}", "", f"computed: weights; {cache:.2f} GiB per 1,000 cached")
    )
    found += [measured_step(step) for step in steps_recorded if step["case"]["shape"] == shape]
    return found + measured_decoding(shape, plan_of(model)[0].effective_depth)


def recorded_steps() -> list[dict[str, Any]]:
    """The lines of our own training steps on an H200, each with its ``flops_per_token``."""
    lines = [json.loads(line) for line in (RESULTS / TRAINING).read_text().splitlines()]
    ours = [line for line in lines if "ours" in line["variants"]]
    return [{**line, "flops_per_token": 1e12 * line["step_tflop"] / line["batch"] / line["seq"]} for line in ours]


def measured_step(found: dict[str, Any]) -> Row:
    ours = found["variants"]["ours"]
    how = [f"{found['batch']} x {found['seq']:,} tokens", f"r={found['case']['rank']}", *beyond_the_plain_step(found)]
    step = f"a training step, {len(found['pairs'])} pairs from {found['pairs'][0][0]}, {', '.join(how)}"
    took = f"{ours['ms_per_step']:,.0f} ms, {ours['tokens_per_second']:,.0f} tokens/s"
    return step, f"{ours['peak_gib']:.1f}", took, f"measured {found['date']}, {found['device']}, `{TRAINING}`"


def measured_decoding(shape: str | None, depth: int) -> list[Row]:
    """Decoding at batch 1 behind 512 cached tokens. Steps that wait for the host are left out: eager ones and,
    under tensor parallelism, compiled ones."""
    found = []
    for file in sorted(path for kind in ("infer", "tensor_parallel") for path in RESULTS.glob(f"{kind}_h*/*.jsonl")):
        for run in infer_table.read([file]):
            for cell in run["cells"] if run["case"]["shape"] == shape else ():
                wanted = cell["form"] == "fused" and cell["what"] == "decode" and cell.get("speedup")
                small = cell["batch"] == 1 and cell["context"] == 512 and cell["layers"] == depth
                of_the_host = cell["mode"] == "eager" or (cell["mode"] == "compile" and run["world"] > 1)
                if wanted and small and not of_the_host:
                    gpus = f"{run['world']} x " if run["world"] > 1 else ""
                    took = f"{cell['ms']:.2f} ms, {cell['speedup']:.2f} x in order"
                    how = f"measured {run['date']}, {gpus}{run['device']}, `{file.relative_to(RESULTS)}`"
                    found.append((f"decode a token fused, {infer_table.SPOKEN[cell['mode']]}", "", took, how))
    return found


def table(found: list[Row]) -> str:
    return markdown(("step", "memory of a GPU, GiB", "time", "where it comes from"), found, left=(0, 3))


def command(options: argparse.Namespace) -> None:
    """Prints the table and, as the last line, one JSON object; ``--page`` puts the table into a page as well."""
    found = rows(load_config(options.config, options.overrides))
    if options.page:
        options.page.write_text(in_page(options.page.read_text(), table(found), MARKS))
    print(f"{table(found)}\n\n{json.dumps({'expected': found})}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--page", type=Path, help="also write the table between the marks of this page")
