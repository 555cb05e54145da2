"""Speed and memory of training steps: ours and what a user would otherwise run, one after the other in one process."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from benchmarks.baselines import TwoModelTrainer
from benchmarks.case import Case, build_base, build_config, model_config, plan, random_rows, tokenizer
from benchmarks.results import compare, identity
from lp_train import models
from lp_train.adapters import attach
from lp_train.bench.flops import peak_flops, step_flops
from lp_train.bench.shapes import build_on_meta
from lp_train.config import Config
from lp_train.data import RowCollator
from lp_train.distill.arguments import training_arguments
from lp_train.distill.compiled import GRAPHS, choose_engine
from lp_train.distill.fp8 import convert_linears
from lp_train.distill.trainer import PairedTrainer
from lp_train.errors import UserError
from lp_train.evaluation.report import environment
from lp_train.pairing import pair_layers
from lp_train.pairing.families import decoder_of


@dataclass(frozen=True)
class Variant:
    """One way to train the same thing. ``two_models``: TRL's trainer and loss with a second copy of the weights."""

    what: str
    two_models: bool = True
    checkpointing: bool = False
    compile: bool = False


VARIANTS = {
    "ours": Variant("this project", two_models=False, compile=True),
    "a": Variant("two models, checkpointing", checkpointing=True),
    "b": Variant("two models"),
    "c": Variant("two models, compiled blocks", compile=True),
}


class StepClock(TrainerCallback):
    """Wall-clock time of the steps after the warm-up. It waits for the GPU at the end of each third of them only."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.ends = sorted({warmup + steps * third // 3 for third in range(4)})
        self.times: list[float] = []
        self.graphs: list[int] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.ends:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            self.graphs.append(compiled_graphs())

    def figures(self) -> dict[str, Any]:
        """Mean over all steps, each third's own mean and their median, and graphs compiled after the warm-up."""
        edges = itertools.pairwise(zip(self.ends, self.times, strict=True))
        blocks = [1e3 * (now - then) / (step - step_then) for (step_then, then), (step, now) in edges]
        return {
            "ms_per_step": 1e3 * (self.times[-1] - self.times[0]) / (self.ends[-1] - self.ends[0]),
            "ms_of_blocks": blocks,
            "ms_median": statistics.median(blocks),
            "recompilations": self.graphs[-1] - self.graphs[0],
        }


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(
    case: Case,
    names: list[str],
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures each variant of ``VARIANTS``; ``keep`` gets each as it is done. Figures that cannot be had are None."""
    state = PartialState(cpu=models.device().type == "cpu")
    if case.fp8 and state.device.type != "cuda":
        raise UserError("--fp8: FP8 products need a Hopper GPU or newer, and this is a CPU; leave it out")
    found = {
        "case": dataclasses.asdict(case),
        **about(case, state.device),
        "matmul_tflops": matmul_tflops(state.device),
    }
    found["step_tflop"] = needed_flops(case) / 1e12
    found["variants"] = rows = {}
    for name in names:
        variant = VARIANTS[name]
        without = variant.two_models and variant.compile and not case.compile  # it would be b again
        rows[name] = {"what": variant.what, **({"error": "not run"} if without else measure(case, variant, state))}
        _add_rates(rows[name], found, peak_flops(state.device))
        say(f"{name}: {rows[name]}")
        keep({**found, "variants": {name: rows[name]}})
    compare(rows)
    return found


def about(case: Case, device: torch.device) -> dict[str, Any]:
    """The origin, and the case in full."""
    config = model_config(case)
    return {
        **origin(device),
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "pairs": [list(pair) for pair in plan(case).pairs],
        "batch": case.size[0],
        "seq": case.size[1],
        "trained_tokens_per_step": case.trained_tokens,
    }


def origin(device: torch.device) -> dict[str, Any]:
    """Versions, device, code, commit and date of a measurement."""
    env = environment(device)
    return {
        **env,
        **identity(device),
        "date": datetime.date.today().isoformat(),
    }


def _add_rates(row: dict[str, Any], found: dict[str, Any], peak: float | None) -> None:
    """Rates by the FLOPs that our step needs, for the baselines too: the same useful work, whatever they execute."""
    if "error" in row:
        return
    seconds, matmul = row["ms_per_step"] / 1e3, found["matmul_tflops"]
    row["tokens_per_second"] = found["batch"] * found["seq"] / seconds
    row["tflops"] = found["step_tflop"] / seconds
    row["mfu"] = row["tflops"] * 1e12 / peak if peak else None
    row["of_matmul"] = row["tflops"] / matmul if matmul else None


def measure(case: Case, variant: Variant, state: PartialState) -> dict[str, Any]:
    """Time and memory of one variant; ``{"error": "out of memory"}`` where it does not fit."""
    free_memory()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _train(case, variant, state, Path(folder))
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        free_memory()


def _train(case: Case, variant: Variant, state: PartialState, folder: Path) -> dict[str, Any]:
    clock = StepClock(case.warmup, case.steps)
    trainer = make_trainer(case, variant, state, folder, clock)
    trainer.train()
    on_gpu = state.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {**clock.figures(), "peak_gib": memory, "loss": trainer.state.log_history[0]["loss"]}


def make_trainer(case: Case, variant: Variant, state: PartialState, folder: Path, clock: StepClock) -> SFTTrainer:
    """The trainer of a variant. All of them get the same weights, rows, adapters, optimizer and precision."""
    checkpointing = variant.checkpointing or (case.gradient_checkpointing and not variant.two_models)
    config = build_config(case, checkpointing)
    teacher = build_base(case, state.device) if variant.two_models else None
    model = paired_model(case, config, state.device)
    if case.fp8 and not variant.two_models:
        convert_linears(decoder_of(model).layers)
    rows, dtype = random_rows(case), models.resolve_dtype(case.dtype, state.device)
    common: dict[str, Any] = {
        "model": model,
        "args": training_arguments(config, folder, state, dtype, "none"),
        "train_dataset": rows,
        "callbacks": [clock],
    }
    collate = RowCollator(case.size[1], pad_token_id=0)
    if teacher is None:
        trainer: SFTTrainer = paired_trainer(case, config, collate, common)
    else:
        common |= {"data_collator": collate, "processing_class": tokenizer()}
        trainer = TwoModelTrainer(teacher=teacher, loss=config.loss, **common)
        for layer in [*decoder_of(teacher).layers, *decoder_of(model).layers] if variant.compile else ():
            layer.compile(dynamic=False)
    trainer.remove_callback(PrinterCallback)
    return trainer


def paired_model(case: Case, config: Config, device: torch.device) -> nn.Module:
    """The base of the case in pairs, with adapters."""
    return attach(pair_layers(build_base(case, device), plan(case), config.plan.algebra), plan(case), config)


def paired_trainer(case: Case, config: Config, collate: RowCollator, common: dict[str, Any]) -> PairedTrainer:
    model, device = common["model"], models.device()
    return PairedTrainer(
        **common,
        loss=config.loss,
        eval_dataset=common["train_dataset"],
        collate=collate,
        tokenizer=tokenizer(),
        measure=dict,
        tokens_per_step=case.tokens_per_step,
        flops=step_flops(model, config, case.lengths).total,
        peak_flops=peak_flops(device),
        engine=choose_engine(config, model, models.resolve_dtype(case.dtype, device), device),
    )


def needed_flops(case: Case) -> float:
    """Of one step of ours; what checkpointing runs again is not needed."""
    config = build_config(case, gradient_checkpointing=False)
    model = build_on_meta(model_config(case), plan(case), config, models.resolve_dtype(case.dtype))
    return step_flops(model, config, case.lengths).total(case.tokens_per_step, case.trained_tokens)


def free_memory() -> None:
    """Nothing of one variant is left for the next: weights, compiled blocks, peak."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = GRAPHS  # for the baselines too
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matmul_tflops(device: torch.device, size: int = 8192, repeats: int = 20) -> float | None:
    """The GPU's rate in TFLOP/s for bf16 products of random square matrices; None on a CPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(5):
        torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12
