"""What a run measures on its way: the original and its untuned pairs, the model in training, the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lp_train.cluster import engine
from lp_train.cluster.launch import say
from lp_train.config import Config
from lp_train.errors import UserError, require_package
from lp_train.evaluation.bench import Bench
from lp_train.evaluation.fidelity import Fidelity, Variant, as_it_is
from lp_train.evaluation.report import recovery
from lp_train.pairing import adapters_off, sequential

if TYPE_CHECKING:
    from lp_train.evaluation.tasks import Suite  # an extra, and slow to import


@dataclass
class Progress:
    """``figures`` of ``sequential``, ``paired`` and in the end ``recovered``; ``answers`` to ``evaluate.prompt``;
    ``tasks_at_start`` where ``watch`` measures tasks. All processes take part in every measurement."""

    bench: Bench
    watch: "Suite | None"
    figures: dict[str, Fidelity] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    tasks_at_start: dict[str, dict[str, float]] | None = None
    by_step: dict[int, Fidelity] = field(default_factory=dict)  # of the model in training

    def before(self, model: nn.Module) -> None:
        """The original, and what pairing costs."""
        self.figures = self.bench.measure(model, {"paired": adapters_off})
        original, paired = self.figures["sequential"], self.figures["paired"]
        say(f"held-out nll: original {original.nll:.4f}, paired {paired.nll:.4f} (kl {paired.kl:.4f})")
        untuned = {"sequential": sequential, "paired": adapters_off}
        self.answers = self.bench.answers(model, untuned)
        if self.watch:
            start = self.tasks_at_start = self._tasks(model, untuned)
            for name, value in start["sequential"].items():
                say(f"{name}: original {value:.4f}, paired {start['paired'][name]:.4f}")

    def during(self, model: nn.Module, step: int, last: int) -> dict[str, float | None]:
        """Figures, recovery and, every ``train.task_steps`` steps and at the last, tasks; for the log."""
        now = self.by_step[step] = self.bench.measure(model, {"recovered": as_it_is})["recovered"]
        won = recovery(self.figures["sequential"], self.figures["paired"], now)
        found: dict[str, float | None] = {f"recovery_{name}": value for name, value in won.items()}
        if self.watch and (step % self.bench.config.train["task_steps"] == 0 or step == last):
            found |= self._tasks(model, {"recovered": as_it_is})["recovered"]
        return now.as_dict() | found

    def after(self, model: nn.Module, step: int) -> None:
        """The result, which is the model of ``step``."""
        known = self.by_step.get(step)
        self.figures["recovered"] = known or self.bench.measure(model, {"recovered": as_it_is})["recovered"]
        self.answers |= self.bench.answers(model, {"recovered": as_it_is})

    def _tasks(self, model: nn.Module, variants: Mapping[str, Variant]) -> dict[str, dict[str, float]]:
        """Of each variant every task's usual figure, on the same items every time; on every process."""
        assert self.watch is not None
        bench, rows = self.bench, self.bench.config.evaluate.task_batch_size
        found, _ = self.watch.run(model, bench.tokenizer, variants, bench.dtype, bench.state, rows)
        return {variant: self.watch.primaries(items) for variant, items in found.items()}


def watched_tasks(config: Config) -> "Suite | None":
    """``evaluate.tasks`` as they are measured during training, if ``train.task_steps`` says so."""
    if not (steps := config.train["task_steps"]):
        return None
    require_package("lm_eval", f"train.task_steps {steps}", 'run `pip install -e ".[eval]"`, or set it to null')
    from lp_train.evaluation.tasks import load_suite

    watch = load_suite(config.evaluate)
    if engine.asked() in engine.IN_PARTS and watch.generates:
        rule = f"one that generates would wait for itself under {engine.asked()}, where answers end at different tokens"
        raise UserError(f"train.task_steps {steps}: {rule}; measure it with scripts/evaluate_run.py")
    return watch
