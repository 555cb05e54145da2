"""What the training loop writes while it runs: one console line and one line of metrics.jsonl per log."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from lp_train.bench.shapes import suffix_blocks
from lp_train.pairing import plan_of
from lp_train.pairing.families import decoder_of

CONSOLE = {  # name in the log -> how it reads on the console
    "loss": "loss {:.4f}",
    "kd": "kd {:.4f}",
    "ce": "ce {:.4f}",
    "hidden": "hidden {:.4f}",
    "grad_norm": "grad {:.2f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "memory_gib": "{:.1f} GiB",
    "seconds_left": "{:.0f} s left",
    "eval_nll": "held-out nll {:.4f}",
    "eval_kl": "kl {:.4f}",
    "eval_top1_agreement": "top-1 agreement {:.1%}",
    "eval_recovery_nll": "won back nll {:.0%}",
    "eval_recovery_kl": "kl {:.0%}",
}


class Console(ProgressCallback):
    """The Trainer's progress bar, with readable log lines."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = [form.format(logs[name]) for name, form in CONSOLE.items() if logs.get(name) is not None]
        tasks = {name.partition("/")[2]: value for name, value in logs.items() if name.startswith("eval_tasks/")}
        parts += [f"{name} {value:.4f}" for name, value in tasks.items()]
        if state.is_world_process_zero and self.training_bar is not None and parts:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))


def checkpoint_blocks(model: nn.Module, every: int) -> None:
    """Of gradient checkpointing, which the Trainer has enabled, keeps every n-th block from the first pair on."""
    blocks = suffix_blocks(plan_of(model)[0], every)
    checkpointed = {i for block, on in blocks for i in block if on}
    for i, layer in enumerate(decoder_of(model).layers):
        layer.gradient_checkpointing = i in checkpointed


class AtStart(TrainerCallback):
    """Calls ``do`` when training begins, model and optimizer being prepared."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.do()


class MetricsFile(TrainerCallback):
    """Appends every log line to ``metrics.jsonl``; the last step always has one, with the final totals."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        control.should_log |= last
        control.should_evaluate |= last and args.eval_strategy != "no"

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
