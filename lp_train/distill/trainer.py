"""TRL's SFTTrainer with the loss of this project: distillation from the same weights run in order."""

import contextlib
import functools
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer
from trl.models.utils import _ForwardRedirection

from lp_train.adapters import autocast, check_adapter
from lp_train.cluster import checkpoint
from lp_train.cluster import engine as engines
from lp_train.cluster.checkpoint import SAVING, is_disk_error
from lp_train.cluster.preemption import Preempted, stop_if_asked
from lp_train.cluster.shard import held, whole, whole_state
from lp_train.config import LossConfig
from lp_train.data.rows import IGNORED
from lp_train.distill.callbacks import AtStart, checkpoint_blocks
from lp_train.distill.compiled import Engine, attention, compiled_block
from lp_train.distill.cuda_graph import GraphedLoss
from lp_train.distill.losses import Head, LossSums, head_loss, hidden_loss
from lp_train.distill.replay import run_block, run_original, run_suffix
from lp_train.errors import UserError, one_line

Collate = Callable[[list[Any]], dict[str, Tensor]]
TOTALS = "totals.json"  # of a checkpoint: what the Trainer's own state does not count
RISE = 3.0  # a loss this many times the one of the first log line will not come back


class TrainingStopped(UserError):
    """The loss is not finite or far above where it started, or a checkpoint cannot be written."""

    line_is_open = True


class PairedTrainer(SFTTrainer):
    """Trains a paired model (PEFT or not) on packed rows.

    The loss is the weighted sum of divergence, cross-entropy and hidden-state error over the trained tokens of the
    whole global batch, divided by their number, so that the gradient does not depend on how the batch is cut into
    micro-batches and processes. ``measure()`` gives the held-out figures for each evaluation, with the model's own
    attention; ``flops`` those of a number of tokens, of which a number is trained. With gradient checkpointing, every
    ``checkpoint_every``-th block from the first pair on is checkpointed.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        loss: LossConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        collate: Collate,
        tokenizer: PreTrainedTokenizerBase,
        measure: Callable[[], Mapping[str, float | None]],
        callbacks: list[TrainerCallback],
        tokens_per_step: int,
        flops: Callable[[float, float], float],
        peak_flops: float | None,
        engine: Engine,
        checkpoint_every: int = 1,
    ) -> None:
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        trained = [p for p in model.parameters() if p.requires_grad]
        dtypes, self.dtype = [p.dtype for p in trained], model.dtype
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=functools.partial(_whole_batch, collate, args.per_device_train_batch_size),
            processing_class=tokenizer,
            callbacks=[*callbacks, AtStart(self._at_start)],
        )
        for parameter, dtype in zip(trained, dtypes, strict=True):  # TRL rounds the adapters of a 4-bit base to bf16
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        if self.is_deepspeed_enabled:
            engines.fit_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None  # it looks for a class that pairing has replaced
        self.model_accepts_loss_kwargs = True  # our loss divides by the global number of trained tokens itself
        self.loss, self.measure, self.engine, self.checkpoint_every = loss, measure, engine, checkpoint_every
        self.tokens_per_step, self.flops, self.peak_flops = tokens_per_step, flops, peak_flops
        self.block = compiled_block() if engine.compile_blocks else run_block
        self._micro_batch = GraphedLoss(self._loss_sums, trained) if engine.cuda_graph else self._loss_sums
        self._own_attention = model.config.get_text_config()._attn_implementation
        self.trained_tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self._pending: list[Tensor] = []  # [kd, ce, hidden] sums of the micro-batches since the last log line
        self._since: tuple[float, int] | None = None  # time and step of the last log line
        self._trained_then = 0  # trained tokens at that line
        self.seconds = 0.0  # of training, evaluations left out
        self._last_checkpoint: str | None = None
        self._evaluation_due = False  # whether this step's evaluation has still to be made
        self.engine_seen: dict[str, Any] = {}  # what runs, from the start of the training on

    # --- the start ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._of_optimizer = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Right after accelerate has prepared the optimizer. Of a model that is sharded already it looks the parameters
        up by address, which those of which this process holds nothing share."""
        if engines.asked() == "FSDP2" and self.optimizer is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._of_optimizer, strict=True):
                group["params"] = parameters
        return super().create_scheduler(*args, **kwargs)

    def _at_start(self) -> None:
        """Some blocks are checkpointed, the engine is looked at, and the evaluation made that a signal cut short in the
        run that this one goes on from."""
        if self.args.gradient_checkpointing:
            checkpoint_blocks(self.model, self.checkpoint_every)
        self.engine_seen = engines.look(self.model_wrapped, *held(self.model))
        if self._evaluation_due:
            if self._determine_best_metric(self.evaluate(), None):
                self.state.best_model_checkpoint = self._last_checkpoint
            self._evaluation_due = False

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch's share of the global loss, times the number of processes since gradients are averaged."""
        unwrapped = self.accelerator.unwrap_model(model)  # through the wrapper's own forward, where its hooks are
        sums = _ForwardRedirection()(model, unwrapped, self._in_forward, inputs)
        count = torch.as_tensor(num_items_in_batch, device=sums.total.device).clamp(min=1)
        self._pending.append(torch.stack([sums.kd, sums.ce, sums.hidden]).detach().float() / count)
        return sums.total * self.accelerator.num_processes / count

    def _in_forward(self, inputs: dict[str, Tensor]) -> LossSums:
        with self._autocast():  # here, since DeepSpeed switches it off at the entrance
            return self._micro_batch(inputs)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """accelerate's; under DeepSpeed, which has none but its own way to cast the adapters, that of the base."""
        if not self.is_deepspeed_enabled:
            return self.accelerator.autocast()
        return autocast(self.dtype, self.args.device)

    def _loss_sums(self, inputs: dict[str, Tensor]) -> LossSums:
        loss, model = self.loss, self.accelerator.unwrap_model(self.model)
        trained, mask = inputs["trained"], inputs.get("trained_mask")
        labels = next_labels(inputs.get("ce_labels", inputs["labels"]))[trained]
        recording = run_original(model, inputs, keep_pair_outputs=loss.hidden > 0, block=self.block)
        hidden, outputs = run_suffix(model, recording, self.block)

        def of_trained(states: Tensor) -> Tensor:
            chosen = states.flatten(0, 1).index_select(0, trained)
            return chosen if mask is None else chosen * mask[:, None]  # the two are alike where they are zero

        labels = labels if mask is None else labels.masked_fill(~mask, IGNORED)
        states = (of_trained(hidden), of_trained(recording.final))
        total, kd, ce = head_loss(*states, labels, Head.of(model), loss, compile=self.engine.compile_loss)
        error = total.new_zeros(())
        for pair, output in outputs.items():
            teacher = of_trained(recording.pair_outputs[pair])
            error = error + hidden_loss(of_trained(output), teacher) / len(outputs)
        return LossSums(total + loss.hidden * error, kd, ce, error)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with attention(self.model, self.engine.attention):
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Tensor | int | None]:
        if self._since is None:
            self._since = (time.perf_counter(), self.state.global_step)
        samples, count = super().get_batch_samples(*args, **kwargs)
        if count is not None:
            self.trained_tokens += torch.as_tensor(count, device=self.trained_tokens.device).long()
        return samples, count

    # --- figures -----------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The held-out figures of :attr:`measure`, logged under ``eval_``."""
        started = time.perf_counter()
        with attention(self.model, self._own_attention):
            found = self.measure().items()
        self._evaluation_due = False
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found if value is not None}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._since is not None:
            self._since = (self._since[0] + time.perf_counter() - started, self._since[1])
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss's parts, tokens/s, MFU, memory and time left to each log line of the training loop."""
        if "loss" in logs:
            weights = {"kd": self.loss.kd, "ce": self.loss.ce, "hidden": self.loss.hidden}
            parts = zip(weights, self._mean_parts().tolist(), strict=True)
            logs.update({name: value for name, value in parts if weights[name]}, **self._speed())
            self._pending.clear()
            self._stop_when_diverged(logs["loss"])
        super().log(logs, start_time)

    def _mean_parts(self) -> Tensor:
        """[kd, ce, hidden] per trained token, over the steps since the last log line and all processes."""
        assert self._since is not None
        steps = max(1, self.state.global_step - self._since[1])
        return self.accelerator.reduce(torch.stack(self._pending).sum(0), "sum") / steps

    def _speed(self) -> dict[str, float]:
        assert self._since is not None
        (then, step_then), now, step = self._since, time.perf_counter(), self.state.global_step
        seconds, self._since = now - then, (now, step)
        self.seconds += seconds
        tokens, trained = self.tokens_per_step * (step - step_then), int(self.trained_tokens) - self._trained_then
        self._trained_then += trained
        speed = {
            "tokens_per_second": tokens / seconds,
            "trained_tokens_per_second": trained / seconds,
            "trained_tokens": int(self.trained_tokens),
            "memory_gib": peak_memory_gib(),
            "seconds_left": (self.state.max_steps - step) * seconds / max(1, step - step_then),
        }
        if self.peak_flops:
            flops = self.flops(tokens, trained) / self.accelerator.num_processes
            speed["mfu"] = flops / seconds / self.peak_flops
        return speed

    def _stop_when_diverged(self, loss: float) -> None:
        first = next((line["loss"] for line in self.state.log_history if line.get("loss")), loss)
        if math.isfinite(loss) and loss <= RISE * first:
            return
        raise TrainingStopped(
            f"loss {loss:.4g} at step {self.state.global_step} (it began at {first:.4g}): training "
            f"diverged; lower train.learning_rate (now {self.args.learning_rate:g}) or raise train.global_batch_tokens "
            f"or train.warmup_steps; {self._kept()}"
        )

    def _kept(self) -> str:
        return f"the last checkpoint is at {self._last_checkpoint}" if self._last_checkpoint else "no checkpoint yet"

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._pending:  # steps that no log line has shown yet: a checkpoint of a diverged model replaces good ones
            weights = torch.tensor([self.loss.kd, self.loss.ce, self.loss.hidden], device=self.args.device)
            self._stop_when_diverged(float((self._mean_parts() * weights).sum()))
        if not all(whole(p).isfinite().all() for p in model.parameters() if p.requires_grad):
            self._stop_when_diverged(math.nan)  # the gradient of a finite loss was not
        try:
            self._write_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_error(error):
                raise
            reason, folder = one_line(error), self.args.output_dir
            raise TrainingStopped(
                f"train.output_dir {str(folder)!r}: step {self.state.global_step} cannot be saved ({reason}); make "
                f"room and go on with --resume; {self._kept()}"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained (without adapters: the whole model), put together from all processes, and read again."""
        adapters, folder = isinstance(self.model, PeftModel), str(output_dir or self.args.output_dir)
        state = whole_state(self.model, trained=adapters, keep=self.args.should_save)
        if self.args.should_save:
            self._save(folder, state_dict=state)
            check_adapter(self.model, Path(folder), state)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Aside, and renamed to its place when all processes have written."""
        folder, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(folder / SAVING)
        try:
            super(SFTTrainer, self)._save_checkpoint(model, trial)  # without TRL's model card: the run's own comes last
        finally:
            self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = str(folder / name)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = self._last_checkpoint
        if self.args.should_save:
            self._publish(folder / SAVING / name, folder / name)
        self.accelerator.wait_for_everyone()

    def _publish(self, written: Path, target: Path) -> None:
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))  # again: with the best checkpoint in its place
        totals = {
            "trained_tokens": int(self.trained_tokens),
            "seconds": self.seconds,
            "evaluation_due": self._evaluation_due,
            "processes": [self.accelerator.num_processes, engines.asked()],
        }
        (written / TOTALS).write_text(json.dumps(totals))
        checkpoint.publish(written, target)
        written.parent.rmdir()
        rotate_checkpoints(str(target.parent), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """A step's end: a signal stops here, with a checkpoint of this step. One that comes in the middle of the step's
        evaluation leaves it to the resumed run."""
        try:
            self._evaluation_due = self.control.should_evaluate
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            stop_if_asked()
        except Preempted:
            if not str(self._last_checkpoint).endswith(f"checkpoint-{self.state.global_step}"):
                self._save_checkpoint(model, trial)
            raise

    @property
    def result_step(self) -> int:
        """The step whose weights the model has after training: the last one, or that of the best checkpoint."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return int(best.rpartition("-")[2]) if best else self.state.global_step

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._last_checkpoint = checkpoint
        totals = json.loads((Path(checkpoint) / TOTALS).read_text())
        self._evaluation_due = totals.get("evaluation_due", False)
        self.trained_tokens += totals["trained_tokens"]
        self._trained_then = totals["trained_tokens"]
        self.seconds += totals["seconds"]


def _whole_batch(collate: Collate, size: int, rows: list[Any]) -> dict[str, Tensor]:
    """A batch of ``size`` rows: the short last one of an epoch is filled up with a row of which nothing is trained, so
    that a compiled step meets one shape."""
    untrained = {name: [IGNORED] * len(v) if name.endswith("labels") else v for name, v in rows[0].items()}
    return collate([*rows, *[untrained] * (size - len(rows))])


def next_labels(labels: Tensor) -> Tensor:
    """labels [B, T] -> [B * T], at each position the label of the next one, and -100 at a row's last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
