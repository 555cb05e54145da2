"""Pairs the layers of a pretrained model and wins back what that costs, by distillation from the same weights in order.

    accelerate launch lp_train/finetune.py configs/demo.yaml
    accelerate launch lp_train/finetune.py configs/llama8b.yaml train.learning_rate=3e-4 --dry-run

Two steps on a CPU, to see it run:

    accelerate launch lp_train/finetune.py configs/demo.yaml train.max_steps=2 evaluate.tokens=2048 --overwrite
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the launcher puts this folder first, where our names would hide those of libraries
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, ProgressCallback
from trl import SFTConfig

from lp_train import models, track
from lp_train.adapters import attach, check_adapter, count_parameters, load_adapter, start_from_activations
from lp_train.bench.flops import forward_costs, peak_flops, step_flops
from lp_train.cluster import engine, preemption
from lp_train.cluster.launch import leave, quieten_libraries, say, start
from lp_train.cluster.preemption import EXIT_PREEMPTED, Preempted
from lp_train.cluster.shard import shard, whole_state
from lp_train.cluster.submit import SubmitEvaluation, check_submit
from lp_train.config import Config, config_to_yaml, load_config
from lp_train.data import data_of
from lp_train.distill import fp8
from lp_train.distill.arguments import training_arguments
from lp_train.distill.callbacks import Console, MetricsFile
from lp_train.distill.compiled import choose_engine
from lp_train.distill.healed import HEAL, fit
from lp_train.distill.trainer import PairedTrainer, peak_memory_gib
from lp_train.dry_run import dry_run
from lp_train.errors import UserError, command_line, exit_code, require_package
from lp_train.evaluation import page, tables
from lp_train.evaluation import report as reports
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.card import write_card
from lp_train.evaluation.fidelity import Fidelity, as_it_is
from lp_train.evaluation.progress import Progress, watched_tasks
from lp_train.pairing import AutoPairs, PairPlan, check_family, decoder_of, in_order, keep_originals, pair_layers
from lp_train.run_folder import check_run_folder, checkpoint_to_resume, locked, open_run_folder
from lp_train.selection.calibration import default_tokens
from lp_train.selection.choose import choose_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code: 2 for a mistake of the user, told in one line, and 85
    where a signal stopped it, to go on with --resume."""
    parser = command_line("finetune.py", __doc__, "train.max_steps=100")
    parser.add_argument("--dry-run", action="store_true", help="draw the plan and the costs; load no weights")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    parser.add_argument("--requeue", action="store_true", help="when a signal stops it, queue this Slurm job again")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the run folder")
    options = parser.parse_intermixed_args(arguments)
    quieten_libraries()
    try:
        return exit_code(lambda: run(load_config(options.config, options.overrides), options), options.debug)
    except Preempted:
        return EXIT_PREEMPTED


def run(config: Config, options: argparse.Namespace) -> None:
    if options.print_config:
        return print(config_to_yaml(config), end="")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite: the one goes on with what the other deletes; give one")
    state = start()
    if options.dry_run:
        return dry_run(config, state.num_processes) if state.is_main_process else None
    try:
        with preemption.watch(state):
            finetune(config, state, options.resume or preemption.restarted(), options.overwrite)
    except Preempted as stopped:
        leave(state)
        if state.is_main_process:
            print(f"{stopped}, after the step; {preemption.requeue() if options.requeue else 'go on with --resume'}")
        raise
    leave(state)


def finetune(config: Config, state: PartialState, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """The whole recipe, in a run folder of its own. Returns the report that it writes there."""
    with state.local_main_process_first():  # a GGUF model is dequantised by one process
        plan = check_plan(config)
    folder = check_run_folder(config, resume, overwrite)
    with locked(folder, state):
        return recover(config, plan, folder, state, resume)


def recover(config: Config, plan: PairPlan | None, folder: Path, state: PartialState, resume: bool) -> dict[str, Any]:
    """The recipe, from a configuration to a report."""
    # what a user can get wrong is looked at before weights are loaded
    say(f"{config.name}: {config.model.name_or_path}, {plan or config.plan.pairs}")
    adapter = start_folder(config)
    dtype = models.resolve_dtype(config.model.dtype, state.device)
    check_submit(config)
    report_to = track.report_to(config.track) if state.is_main_process else "none"
    args = training_arguments(config, folder, state, dtype, report_to)
    say(f"{state.num_processes} x {state.device.type} in {dtype}, {args.max_steps} steps".replace("torch.", ""))
    tokenizer = models.load_tokenizer(config.model)
    tokens = args.max_steps * config.train["global_batch_tokens"]
    calibration = default_tokens(state.device) if AutoPairs.parse(config.plan.pairs) else 0
    with state.main_process_first():
        data = data_of(config, tokenizer, tokens if tokens > 0 else None, calibration_tokens=calibration)
    say(f"data: {data.stats}")
    config, plan, base = choose_plan(config, plan, data.calibration, tokenizer, state)
    watch = watched_tasks(config)

    # the model in pairs, with something to train in them
    bench = Bench(config, data, tokenizer, state)
    extra = unquantised_original(plan, bench) if config.model.quantization else {}
    set_seed(args.seed)
    model = build_model(config, plan, state.device, base)
    checkpoint = checkpoint_to_resume(folder, model, state, resume)
    extra |= start_adapters(model, bench, adapter, args.per_device_train_batch_size, fitted=checkpoint is not None)
    trainable, everything = count_parameters(model)
    say(f"trains {trainable:,} of {everything:,} parameters; the original and the untuned pairs are measured first")

    # all is good: the folder becomes this run's
    extra["cost"] = forward_costs(model, config.train["max_length"])
    shard(model)
    open_run_folder(folder, config, state, resume)
    if state.is_main_process:
        record = {"config": dataclasses.asdict(config), "environment": reports.environment(state.device)}
        track.start(config.track, folder, config.name, record)

    # what pairing costs, training, what came back
    progress = Progress(bench, watch)
    progress.before(model)
    trainer = make_trainer(model, args, bench)
    if config.evaluate.submit:
        trainer.add_callback(SubmitEvaluation())
    trainer.measure = lambda: progress.during(model, trainer.state.global_step, trainer.state.max_steps)
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train(resume_from_checkpoint=checkpoint)
    progress.after(model, trainer.result_step)

    # everything on disk, before a control that may take as long again
    extra |= {"tasks_at_start": progress.tasks_at_start} if watch else {}
    report = make_report(plan, progress.figures, trainer, bench) | extra | {"sample": progress.answers or None}
    save_result(model, tokenizer, config, folder, state)
    if state.is_main_process:
        write_report(config, folder, report, trainer)
    if config.loss.ce > 0:
        report["control"] = train_control(plan, args, bench, resume).as_dict()
    if state.is_main_process:
        write_report(config, folder, report, trainer)
        track.finish(report, tables.tables(report), folder)
    say(f"\n{page.plain(tables.fidelity_table(report))}\n\n{tables.sentence(report)}\n")
    if progress.answers:
        say(tables.answers(progress.answers) + "\n")
    say(f"report {folder}/report.md and report.html, plots {folder}/plots/, weights {result_folder(config, folder)}/")
    return report


# --- the steps -------------------------------------------------------------------------------------------------------


def check_plan(config: Config) -> PairPlan | None:
    """The plan, or None where one is to be chosen, checked against the model's published configuration."""
    if (wanted := AutoPairs.parse(config.plan.pairs)) is None:
        return check_model(config)
    wanted.count(check_base(config))
    return None


def check_model(config: Config) -> PairPlan:
    plan = PairPlan.parse(config.plan.pairs, num_layers=check_base(config))
    return plan.control(config.plan.kind, config.plan.remove)


def check_base(config: Config) -> int:
    """The number of the base's layers, from its published configuration."""
    model_config = models.load_model_config(config.model).get_text_config()
    family, attention = check_family(model_config.model_type), config.model.attn_implementation
    if attention in family.wrong_attention:
        rule = f"leaves out a part of {model_config.model_type}'s attention; use auto, eager or flex_attention"
        raise UserError(f"model.attn_implementation {attention!r}: {rule}")
    if config.model.quantization:
        require_package("bitsandbytes", "model.quantization 'nf4'", 'run `pip install -e ".[quant]"`')
    for key, value in {"model.quantization": config.model.quantization, "train.fp8": config.train["fp8"]}.items():
        if value and engine.asked() in engine.IN_PARTS:
            raise UserError(f"{key} {value!r}: such weights cannot be cut; use configs/accelerate/ddp.yaml")
    return model_config.num_hidden_layers


def start_folder(config: Config) -> Path | None:
    """The adapter that training starts from, if it is in a folder."""
    start = config.lora["start_from"]
    if start == HEAL and engine.asked() == "FSDP2":  # the base is in host memory there
        rule = "under FSDP2 each process would make the fit on its CPU"
        raise UserError(f"lora.start_from 'heal': {rule}; make it with scripts/heal.py and give its folder")
    return None if start in (None, HEAL) else models.adapter_folder(start)


def start_adapters(model: nn.Module, bench: Bench, start: Path | None, rows: int, fitted: bool) -> dict[str, Any]:
    """Before training: the adapter in ``start``, or what the model's activations say (``init_lora_weights: eva``,
    ``start_from: heal``; not again where a checkpoint follows, ``fitted``). Returns what the report holds of it."""
    lora, where = bench.config.lora, model.device
    if start:
        load_adapter(model, start)
    if lora.get("init_lora_weights") == "eva":
        with bench.autocast():
            start_from_activations(model, bench.training_batches(rows, 16, where))
    if lora["start_from"] != HEAL:
        return {}
    if fitted:
        return {"healed_start": {}}
    healed = fit(model, bench.batches_of(lora["heal_tokens"], where), bench.autocast)
    say(f"healed: adapters fitted on {healed['tokens']:,} tokens in {healed['seconds']:.0f} s")
    return {"healed_start": healed}


def build_model(config: Config, plan: PairPlan, device: torch.device, base: nn.Module | None = None) -> nn.Module:
    """The base in pairs, with adapters or unfrozen layers, and the record of plan and base in its config. It is loaded
    where it is not given, and always for an engine that shards it."""
    engine.load_whole()
    base = None if engine.asked() in engine.SHARDED else base
    keeps_copies = config.tune == "full" or plan.kind == "merge"  # of layers, which stay whole where they are made
    on_cpu = engine.asked() == "FSDP2" and not keeps_copies  # a GPU need not hold all of it
    base = base or models.load_base(config.model, torch.device("cpu") if on_cpu else device)
    model = pair_layers(base, plan, config.plan.algebra)
    if config.tune == "full":
        keep_originals(model)
    model = attach(model, plan, config)
    if config.train["fp8"]:
        fp8.require_hopper(device)
        fp8.convert_linears(decoder_of(model).layers)
    models.stamp(model, config.model)
    return model


def make_trainer(model: nn.Module, args: SFTConfig, bench: Bench) -> PairedTrainer:
    """TRL's trainer with this loss. Its ``measure``, called at each evaluation, is set by whoever has evaluations."""
    config = bench.config
    document_lengths = bench.data.train.with_format("arrow")["seq_lengths"].combine_chunks()
    trainer = PairedTrainer(
        model=model,
        args=args,
        loss=config.loss,
        train_dataset=bench.data.train,
        eval_dataset=bench.data.eval,
        collate=bench.collate,
        tokenizer=bench.tokenizer,
        measure=dict,
        callbacks=[MetricsFile(Path(str(args.output_dir)) / "metrics.jsonl")],
        tokens_per_step=config.train["global_batch_tokens"],
        flops=step_flops(model, config, document_lengths.flatten().to_numpy()).total,
        peak_flops=peak_flops(bench.state.device),
        engine=choose_engine(config, model, bench.dtype, bench.state.device),
        checkpoint_every=config.train["gradient_checkpointing_every"],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Console)
    if (patience := config.train["early_stopping_patience"]) and args.eval_strategy != "no":
        trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer


def train_control(plan: PairPlan, args: SFTConfig, bench: Bench, resume: bool) -> Fidelity:
    """The same training without pairs. Cross-entropy alone also moves the original, which recovery must not count."""
    say("control: the same adapters and data, layers in order")
    alone: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    args = dataclasses.replace(args, output_dir=f"{args.output_dir}/control", report_to="none", **alone)
    set_seed(args.seed)
    model = build_model(bench.config, plan, bench.state.device)
    with in_order(model):
        checkpoint = checkpoint_to_resume(Path(str(args.output_dir)), model, bench.state, resume)
        trainer = make_trainer(shard(model), args, bench)
        trainer.train(checkpoint)
        return bench.measure(model, {"control": as_it_is})["control"]


def unquantised_original(plan: PairPlan, bench: Bench) -> dict[str, Any]:
    """The NLL of the original before quantisation, from weights that are let go again."""
    full = dataclasses.replace(bench.config.model, quantization=None)
    model = pair_layers(models.load_base(full, bench.state.device), plan, bench.config.plan.algebra)
    return {"unquantised": {"nll": bench.measure(model, {})["sequential"].nll}}


def make_report(plan: PairPlan, figures: dict[str, Fidelity], trainer: PairedTrainer, bench: Bench) -> dict[str, Any]:
    """``report.json`` but for what only some runs have."""
    report, seconds = bench.report(plan, figures), trainer.seconds
    tokens = trainer.state.global_step * bench.config.train["global_batch_tokens"]
    report["environment"] |= trainer.engine_seen
    report["result_step"] = trainer.result_step
    report["train"] = {
        "tokens": tokens,
        "trained_tokens": int(trainer.trained_tokens),
        "dropped_tokens": bench.data.stats.dropped_tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(),
    }
    return report


def write_report(config: Config, folder: Path, report: dict[str, Any], trainer: PairedTrainer) -> None:
    """The report and its plots, and the card beside the weights."""
    reports.write(folder / "report.json", reports.as_json(report))
    reports.write_document(folder, report, trainer.state.log_history, config.train["global_batch_tokens"])
    write_card(folder, report, config.model.name_or_path)


def result_folder(config: Config, folder: Path) -> Path:
    return folder / ("adapter" if config.tune == "lora" else "model")


def save_result(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: Config, folder: Path, state: PartialState
) -> None:
    """``adapter/`` (PEFT's format) or ``model/``, with the tokenizer, whole or not at all. All processes call it."""
    weights = whole_state(model, trained=config.tune == "lora", keep=state.is_main_process)
    if config.tune == "full":
        weights = {name: value.to(models.resolve_dtype(config.model.dtype)) for name, value in weights.items()}

    def write(target: Path) -> None:
        model.save_pretrained(target, state_dict=weights)
        check_adapter(model, target, weights)
        tokenizer.save_pretrained(target)

    if state.is_main_process:
        models.write_folder(result_folder(config, folder), write)


if __name__ == "__main__":
    sys.exit(main())
