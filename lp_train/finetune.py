"""Pairs the layers of a pretrained model and wins back what that costs, by distillation from the same weights in order.

    accelerate launch lp_train/finetune.py configs/demo.yaml
    accelerate launch lp_train/finetune.py configs/llama8b.yaml train.learning_rate=3e-4 --dry-run

Two steps on a CPU, to see it run:

    accelerate launch lp_train/finetune.py configs/demo.yaml train.max_steps=2 evaluate.tokens=2048 --overwrite
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the launcher puts this folder first, where our names would hide those of libraries
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import argparse
import ctypes.util
import dataclasses
import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from trl import SFTConfig

from lp_train import models, track
from lp_train.adapters import attach, count_parameters, start_from_activations
from lp_train.bench.flops import peak_flops, step_flops
from lp_train.config import Config, config_to_yaml, load_config
from lp_train.data import Data, RowCollator, build_data
from lp_train.distill import fp8
from lp_train.distill.arguments import training_arguments
from lp_train.distill.callbacks import Console, MetricsFile
from lp_train.distill.compiled import choose_engine
from lp_train.distill.trainer import PairedTrainer, TrainingDiverged, peak_memory_gib
from lp_train.dry_run import dry_run
from lp_train.errors import UserError
from lp_train.evaluation import report as reports
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.fidelity import Fidelity, as_it_is
from lp_train.evaluation.runs import write_card
from lp_train.pairing import PairPlan, adapters_off, in_order, keep_originals, pair_layers, sequential
from lp_train.pairing.families import check_family, decoder_of
from lp_train.run_folder import checkpoint_to_resume, open_run_folder

if TYPE_CHECKING:
    from lp_train.evaluation.tasks import Watch


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code: 2 for a mistake of the user, told in one line."""
    parser = argparse.ArgumentParser(
        prog="finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.max_steps=100")
    parser.add_argument("--dry-run", action="store_true", help="draw the plan and the costs; load no weights")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the run folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    try:
        run(load_config(options.config, options.overrides), options)
    except UserError as error:
        if options.debug:
            raise
        if isinstance(error, TrainingDiverged):  # the progress bar has left its line open
            print(file=sys.stderr)
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    return 0


def quieten_libraries() -> None:
    """Hides what libraries say about themselves; what they say about the run stays."""
    warnings.filterwarnings("ignore", message="Could not find a config file")  # PEFT, of a base that is no hub model
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_engine(state: PartialState) -> None:
    """Refuses engines that this version does not train on, and processes that do not know of each other."""
    expected, engine = int(os.environ.get("WORLD_SIZE", "1")), state.distributed_type.value
    if expected != state.num_processes:
        raise UserError(
            f"WORLD_SIZE {expected}: this process sees a world of {state.num_processes}; on CPUs launch with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    if engine not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"accelerate's engine {engine}: not supported; use one process, or --multi_gpu (DDP)")


def use_all_cores(state: PartialState) -> None:
    """``accelerate launch`` sets one thread per process unless told; alone on a CPU that leaves cores idle."""
    launched, alone = "ACCELERATE_MIXED_PRECISION" in os.environ, state.num_processes == 1
    if launched and alone and state.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def keep_freed_memory(state: PartialState) -> None:
    """On a CPU with glibc a step would give the memory of its logits back and fetch it again, page by page: a quarter
    of its time."""
    libc = ctypes.util.find_library("c")
    if state.device.type == "cpu" and libc and hasattr(loaded := ctypes.CDLL(libc), "mallopt"):
        loaded.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most it takes
        loaded.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run(config: Config, options: argparse.Namespace) -> None:
    if options.print_config:
        return print(config_to_yaml(config), end="")
    state = PartialState(cpu=models.device().type == "cpu")
    check_engine(state)
    use_all_cores(state)
    keep_freed_memory(state)
    if not options.dry_run:
        finetune(config, state, options.resume, options.overwrite)
        state.wait_for_everyone()
        state.destroy_process_group()  # a process that ends while its peers still talk to it aborts now and then
    elif state.is_main_process:
        dry_run(config, state.num_processes)


def finetune(config: Config, state: PartialState, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """The whole recipe. Returns the report that it writes to the run folder."""
    say = functools.partial(print, flush=True) if state.is_main_process else lambda *_: None

    # what a user can get wrong is looked at before weights are loaded
    with state.local_main_process_first():  # a GGUF model is dequantised by one process
        plan = check_model(config)
    say(f"{config.name}: {config.model.name_or_path}, {plan}")
    folder = open_run_folder(config, state, resume, overwrite)
    dtype = models.resolve_dtype(config.model.dtype, state.device)
    report_to = track.start(config.track, folder, config.name) if state.is_main_process else "none"
    args = training_arguments(config, folder, state, dtype, report_to)
    say(f"{state.num_processes} x {state.device.type} in {dtype}, {args.max_steps} steps".replace("torch.", ""))
    tokenizer = models.load_tokenizer(config.model)
    with state.main_process_first():
        data = load_data(config, args, tokenizer)
    say(f"data: {data.stats}")

    # the model in pairs, with something to train in them
    bench = Bench(config, data, RowCollator(config.train["max_length"], tokenizer.pad_token_id), state, dtype)
    extra = unquantised_original(config, plan, bench) if config.model.quantization else {}
    set_seed(args.seed)
    model = build_model(config, plan, state.device)
    if config.lora.get("init_lora_weights") == "eva":
        with bench.autocast():
            start_from_activations(model, bench.training_batches(args.per_device_train_batch_size, count=16))
    trainable, everything = count_parameters(model)
    say(f"trains {trainable:,} of {everything:,} parameters")

    # before training: the original, and what pairing costs
    before = bench.measure(model, {"paired": adapters_off})
    original, paired = before["sequential"], before["paired"]
    say(f"held-out nll: original {original.nll:.4f}, paired {paired.nll:.4f} (kl {paired.kl:.4f})")
    answers = bench.answers(model, tokenizer, {"sequential": sequential, "paired": adapters_off})
    watch, task_steps = watched_tasks(config, tokenizer, dtype), config.train["task_steps"]
    if watch:
        start = extra["tasks_at_start"] = watch(model, {"sequential": sequential, "paired": adapters_off})
        for name, value in start["sequential"].items():
            say(f"{name}: original {value:.4f}, paired {start['paired'][name]:.4f}")

    measured_at: dict[int, Fidelity] = {}  # by step

    def held_out() -> dict[str, float | None]:
        step = trainer.state.global_step
        now = measured_at[step] = bench.measure(model, {"recovered": as_it_is})["recovered"]
        won: dict[str, float | None] = {}
        for name, value in reports.recovery(original, paired, now).items():
            won[f"recovery_{name}"] = value
        if watch and (step % task_steps == 0 or step == trainer.state.max_steps):
            won |= watch(model, {"recovered": as_it_is})["recovered"]
        return now.as_dict() | won

    trainer = make_trainer(model, args, config, plan, bench, tokenizer, held_out)
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(folder, model, resume))

    # after: what came back, and everything on disk
    step = trainer.result_step
    recovered = measured_at.get(step) or bench.measure(model, {"recovered": as_it_is})["recovered"]
    answers |= bench.answers(model, tokenizer, {"recovered": as_it_is})
    figures = {"sequential": original, "paired": paired, "recovered": recovered}
    report = make_report(config, plan, figures, trainer, data, state) | extra | {"sample": answers or None}
    if state.is_main_process:
        save_result(model, tokenizer, config, folder)
        write_report(config, folder, report, trainer)
    if config.loss.ce > 0:
        report["control"] = train_control(config, plan, args, bench, tokenizer).as_dict()
    if state.is_main_process:
        write_report(config, folder, report, trainer)
        track.finish(report, folder)
    say(f"\n{reports.table(report)}\n\n{reports.sentence(report)}\n")
    if answers:
        say(reports.answers(answers) + "\n")
    say(f"report {folder}/report.md and report.html, plots {folder}/plots/, weights {result_folder(config, folder)}/")
    return report


# --- the steps -------------------------------------------------------------------------------------------------------


def check_model(config: Config) -> PairPlan:
    """The plan, checked against the model's published configuration."""
    model_config = models.load_model_config(config.model).get_text_config()
    family, attention = check_family(model_config.model_type), config.model.attn_implementation
    if attention in family.wrong_attention:
        raise UserError(
            f"model.attn_implementation {attention!r}: leaves out a part of {model_config.model_type}'s attention; "
            "use auto, eager or flex_attention"
        )
    if config.model.quantization:
        models.require_bitsandbytes()
    return PairPlan.parse(config.plan.pairs, num_layers=model_config.num_hidden_layers)


def load_data(config: Config, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    return build_data(
        config.data,
        tokenizer,
        max_length=config.train["max_length"],
        train_tokens=args.max_steps * config.train["global_batch_tokens"] if args.max_steps > 0 else None,
        eval_tokens=config.evaluate.tokens,
        kd_on=config.loss.kd_on,
        seed=args.seed,
    )


def build_model(config: Config, plan: PairPlan, device: torch.device) -> nn.Module:
    """The base in pairs, with adapters or unfrozen layers, and the record of plan and base in its config."""
    model = pair_layers(models.load_base(config.model, device), plan, config.plan.algebra)
    if config.tune == "full":
        keep_originals(model)
    model = attach(model, plan, config)
    if config.train["fp8"]:
        fp8.require_hopper(device)
        fp8.convert_linears(decoder_of(model).layers)
    models.stamp(model, config.model)
    return model


def make_trainer(
    model: nn.Module,
    args: SFTConfig,
    config: Config,
    plan: PairPlan,
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Callable[[], dict[str, float | None]],
) -> PairedTrainer:
    document_lengths = bench.data.train.with_format("arrow")["seq_lengths"].combine_chunks()
    trainer = PairedTrainer(
        model=model,
        args=args,
        loss=config.loss,
        train_dataset=bench.data.train,
        eval_dataset=bench.data.eval,
        collate=bench.collate,
        tokenizer=tokenizer,
        measure=held_out,
        callbacks=[MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
        tokens_per_step=config.train["global_batch_tokens"],
        flops=step_flops(model, config, document_lengths.flatten().to_numpy()).total,
        peak_flops=peak_flops(bench.state.device),
        engine=choose_engine(config, model, bench.dtype, bench.state.device),
        checkpoint_every=config.train["gradient_checkpointing_every"],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Console)
    if (patience := config.train["early_stopping_patience"]) and args.eval_strategy != "no":
        trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer


def watched_tasks(config: Config, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Watch | None:
    if not config.train["task_steps"]:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "train.task_steps: tasks need the package lm-eval; run `pip install -e .[eval]`, or set it to null"
        )
    from lp_train.evaluation.tasks import Watch  # an extra, and slow to import

    return Watch(config.evaluate, tokenizer, dtype)


def train_control(
    config: Config, plan: PairPlan, args: SFTConfig, bench: Bench, tokenizer: PreTrainedTokenizerBase
) -> Fidelity:
    """The same training without pairs. Cross-entropy alone also moves the original, which recovery must not count."""
    print("control: the same adapters and data, layers in order", flush=True)
    folder = f"{args.output_dir}/control"
    args = dataclasses.replace(
        args, output_dir=folder, report_to="none", eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    set_seed(args.seed)
    model = build_model(config, plan, bench.state.device)
    with in_order(model):
        make_trainer(model, args, config, plan, bench, tokenizer, dict).train()
        return bench.measure(model, {"control": as_it_is})["control"]


def unquantised_original(config: Config, plan: PairPlan, bench: Bench) -> dict[str, Any]:
    """The NLL of the original before quantisation, from weights that are let go again."""
    full = dataclasses.replace(config.model, quantization=None)
    model = pair_layers(models.load_base(full, bench.state.device), plan, config.plan.algebra)
    return {"unquantised": {"nll": bench.measure(model, {})["sequential"].nll}}


def make_report(
    config: Config,
    plan: PairPlan,
    figures: dict[str, Fidelity],
    trainer: PairedTrainer,
    data: Data,
    state: PartialState,
) -> dict[str, Any]:
    tokens, seconds = trainer.state.global_step * config.train["global_batch_tokens"], trainer.seconds
    return {
        "name": config.name,
        "tune": config.tune,
        "plan": {
            "pairs": [list(pair) for pair in plan.pairs],
            "algebra": config.plan.algebra,
            "num_layers": plan.num_layers,
        },
        "effective_depth": plan.effective_depth,
        "result_step": trainer.result_step,
        **{name: fidelity.as_dict() for name, fidelity in figures.items()},
        "gap": reports.gap(figures["sequential"], figures["paired"]),
        "recovery": reports.recovery(figures["sequential"], figures["paired"], figures["recovered"]),
        "train": {
            "tokens": tokens,
            "trained_tokens": int(trainer.trained_tokens),
            "dropped_tokens": data.stats.dropped_tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory_gib(),
        },
        "evaluation": {
            "tokens": int(figures["paired"].tokens.sum()),
            "rows": len(figures["paired"].tokens),
        },
        "data": data.stats.as_dict(),
        "environment": reports.environment(state.device),
    }


def write_report(config: Config, folder: Path, report: dict[str, Any], trainer: PairedTrainer) -> None:
    """The report and its plots, and the card beside the weights."""
    reports.write_report(folder, report, trainer.state.log_history, config.train["global_batch_tokens"])
    write_card(folder, report, config.model.name_or_path)


def result_folder(config: Config, folder: Path) -> Path:
    return folder / ("adapter" if config.tune == "lora" else "model")


def save_result(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: Config, folder: Path) -> None:
    """``adapter/`` (PEFT's format) or ``model/``, with the tokenizer, whole or not at all."""
    if config.tune == "full":
        model = model.to(models.resolve_dtype(config.model.dtype))

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    models.write_folder(result_folder(config, folder), write)


if __name__ == "__main__":
    sys.exit(main())
