"""PairedTrainer on a tiny model: the gradient of a global batch, logs, resuming, and stopping before harm is done."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from lp_train.config import LossConfig
from lp_train.data import RowCollator
from lp_train.distill.callbacks import MetricsFile
from lp_train.distill.trainer import PairedTrainer, TrainingDiverged
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import pair_layers, sequential, unpair_layers

LENGTH, PAIRS = 20, "2:6"
COLLATE = RowCollator(LENGTH, pad_token_id=3)
EXACT: dict[str, Any] = {  # plain gradient descent: the step is the gradient
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 1,
}
ALL = LossConfig(kd=1.0, ce=0.5, hidden=2.0)

Make = Callable[..., PairedTrainer]


def packed_rows(number: int, vocab: int, ce_labels: bool = False) -> Dataset:
    """Rows of two documents with 0 to 17 trained tokens each; the third row has none."""
    draw = np.random.default_rng(0)
    columns = ("input_ids", "labels", "seq_lengths", *(["ce_labels"] if ce_labels else []))
    table: dict[str, list[list[int]]] = {name: [] for name in columns}
    for row in range(number):
        lengths = [4 + row % 5, 11]
        ids = draw.integers(4, vocab, sum(lengths))
        labels = np.where(draw.random(len(ids)) < (row % 4 + 1) / 4, ids, -100)
        labels[[0, lengths[0]]] = -100
        if row == 2:
            labels[:] = -100
        fewer = np.where(np.arange(len(ids)) % 2, labels, -100)
        for name, values in zip(columns, (ids, labels, lengths, fewer), strict=False):
            table[name].append([int(value) for value in values])
    return Dataset.from_dict(table)


def paired_with_adapter(tiny_llama: LlamaForCausalLM, dropout: float) -> nn.Module:
    """Weights large enough that pairing costs something, and a B that is not zero so that A has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    model = pair_layers(tiny_llama, PAIRS).requires_grad_(False)
    targets = [f"model.layers.{i}.{name}" for i in range(2, 6) for name in ("self_attn.q_proj", "mlp.down_proj")]
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if parameter.ndim > 1 and "lora_A" not in name:
            scale = 0.05 if "lora_B" in name else 0.2
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return peft


@pytest.fixture
def make(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    """A trainer of a fresh copy of one model. ``rows``: a number or a dataset; ``batch``: rows x accumulation."""
    start = {name: value.clone() for name, value in tiny_llama.state_dict().items()}

    def build(
        loss: LossConfig = ALL,
        rows: int | Dataset = 8,
        batch: tuple[int, int] = (4, 2),
        name: str = "run",
        dropout: float = 0.0,
        evaluate: Callable[[nn.Module], Mapping[str, float | None]] = lambda model: {},
        callbacks: tuple[TrainerCallback, ...] = (),
        **options: Any,
    ) -> PairedTrainer:
        base = LlamaForCausalLM(tiny_llama.config).float()
        base.load_state_dict(start)
        model, folder = paired_with_adapter(base, dropout), tmp_path / name
        dataset = packed_rows(rows, base.config.vocab_size) if isinstance(rows, int) else rows
        defaults = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False}
        args = SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch[0],
            gradient_accumulation_steps=batch[1],
            use_cpu=True,
            bf16=False,
            max_length=LENGTH,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            **{**defaults, **options},
        )
        return PairedTrainer(
            model=model,
            args=args,
            loss=loss,
            train_dataset=dataset,
            eval_dataset=dataset,
            collate=COLLATE,
            tokenizer=tiny_tokenizer,
            measure=lambda: evaluate(model),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), *callbacks],
            tokens_per_step=batch[0] * batch[1] * LENGTH,
            flops_per_token=1e3,
            peak_flops=1e6,
        )

    return build


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logged(trainer: PairedTrainer, name: str = "loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Largest difference of each tensor relative to its largest value; 0: bitwise."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def step_taken(trainer: PairedTrainer) -> dict[str, Tensor]:
    """Trains, and returns what was subtracted from each weight."""
    before = adapter(trainer.model)
    trainer.train()
    return {name: before[name] - value for name, value in adapter(trainer.model).items()}


def reference_loss(model: nn.Module, batch: dict[str, Tensor], loss: LossConfig) -> Tensor:
    """ALL's kind of loss over one batch, from whole forwards, whole logits and plain autograd."""
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    ce_labels = batch.pop("ce_labels", None)
    ce_labels = labels if ce_labels is None else ce_labels[:, 1:]
    ours = model(**batch, use_cache=False, output_hidden_states=True)
    with torch.no_grad(), sequential(model):
        theirs = model(**batch, use_cache=False, output_hidden_states=True)
    kept = labels != -100
    log_q, log_p = (F.log_softmax(out.logits[:, :-1][kept], -1) for out in (ours, theirs))
    total = loss.kd * (log_p.exp() * (log_p - log_q)).sum()
    if loss.ce:
        total = total + loss.ce * F.cross_entropy(log_q, ce_labels[kept], reduction="sum")
    if loss.hidden:
        states: list[list[Tensor]] = [[], []]  # after the first pair, and before the final norm after the second
        for which, switch in enumerate((as_it_is, sequential)):
            hook = model.get_decoder().norm.register_forward_pre_hook(
                lambda _, args, which=which: states[which].append(args[0])
            )
            with switch(model):
                states[which].append(model(**batch, use_cache=False, output_hidden_states=True).hidden_states[4])
            hook.remove()
        for s, t in zip(*states, strict=True):
            t = t.detach()
            total = (
                total + loss.hidden / 2 * ((s - t)[:, :-1].square().sum(-1) / t[:, :-1].square().sum(-1))[kept].sum()
            )
    return total / kept.sum()


# --- the global batch


@pytest.mark.parametrize("loss", [LossConfig(), ALL], ids=["kd", "all"])
def test_the_step_is_the_gradient_of_the_mean_over_the_whole_batch(make: Make, loss: LossConfig) -> None:
    trainer = make(loss, batch=(2, 4), **EXACT)
    expected = reference_loss(trainer.model, COLLATE(list(trainer.train_dataset)), loss)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    grads = dict(zip(parameters, torch.autograd.grad(expected, parameters.values()), strict=True))
    found = step_taken(trainer)
    assert_same_weights(found, grads)
    assert logged(trainer) == pytest.approx([expected.item()], rel=1e-5)


@pytest.mark.parametrize("batch", [(1, 8), (2, 4), (4, 2)], ids=["8x1", "4x2", "2x4"])
def test_the_step_does_not_depend_on_the_micro_batches(make: Make, batch: tuple[int, int]) -> None:
    whole, cut = make(batch=(8, 1), name="whole", **EXACT), make(batch=batch, name="cut", **EXACT)
    labels = [sum(label != -100 for label in row) for row in whole.train_dataset["labels"]]
    assert 0 in labels and len(set(labels)) > 4  # unequal, and for batches of one a micro-batch without any
    assert_same_weights(step_taken(cut), step_taken(whole))
    for name in ("loss", "kd", "ce", "hidden", "grad_norm", "trained_tokens"):
        assert logged(cut, name) == pytest.approx(logged(whole, name), rel=1e-5)
    assert logged(cut, "trained_tokens") == [sum(labels)]


def test_a_short_last_accumulation_divides_by_its_own_tokens(make: Make) -> None:
    options = {**EXACT, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 0.1}
    whole, cut = (make(rows=11, batch=b, name=f"{b}", **options) for b in ((8, 1), (1, 8)))
    assert_same_weights(step_taken(cut), step_taken(whole))
    assert cut.state.global_step == whole.state.global_step == 4  # 8 and 3 rows, twice
    assert logged(cut) == pytest.approx(logged(whole), rel=1e-5)
    labels = np.array([label for row in cut.train_dataset["labels"] for label in row])
    assert int(cut.trained_tokens) == 2 * (labels != -100).sum()


def test_a_batch_without_any_trained_token_moves_nothing(make: Make) -> None:
    rows = packed_rows(3, 300).select([2, 2])
    trainer = make(rows=rows, batch=(1, 2), **EXACT)
    assert all(step.abs().max() == 0 for step in step_taken(trainer).values())
    assert logged(trainer) == [0.0]


def test_gradient_checkpointing_changes_no_step(make: Make) -> None:
    plain = step_taken(make(name="plain", **EXACT))
    again = step_taken(make(name="checkpointed", **{**EXACT, "gradient_checkpointing": True}))
    assert_same_weights(again, plain, 0)


# --- the parts of the loss


def test_cross_entropy_alone_is_that_of_transformers(make: Make) -> None:
    trainer = make(LossConfig(kd=0.0, ce=1.0), batch=(1, 8), **EXACT)
    batch = COLLATE(list(trainer.train_dataset))
    with torch.no_grad():
        expected = trainer.model(**batch, use_cache=False).loss.item()  # the mean over labels that are not -100
    trainer.train()
    assert logged(trainer) == pytest.approx([expected], rel=1e-5)
    assert logged(trainer, "ce") == pytest.approx([expected], rel=1e-5)
    assert logged(trainer, "kd") == logged(trainer, "hidden") == []


def test_cross_entropy_follows_its_own_labels_where_there_are_some(make: Make, tiny_llama: nn.Module) -> None:
    rows = packed_rows(8, tiny_llama.config.vocab_size, ce_labels=True)
    trainer = make(LossConfig(kd=1.0, ce=1.0), rows=rows, **EXACT)
    batch = COLLATE(list(rows))
    assert (batch["ce_labels"] != -100).sum() < (batch["labels"] != -100).sum()
    expected = reference_loss(trainer.model, batch, trainer.loss).item()
    trainer.train()
    assert logged(trainer) == pytest.approx([expected], rel=1e-5)


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(make: Make) -> None:
    trainer = make(LossConfig(kd=0.7, beta=0.3, temperature=2.0, ce=0.2, hidden=3.0), max_steps=6, logging_steps=2)
    trainer.train()
    parts = zip(*(logged(trainer, name) for name in ("loss", "kd", "ce", "hidden")), strict=True)
    found = [(loss, 0.7 * kd + 0.2 * ce + 3.0 * hidden) for loss, kd, ce, hidden in parts]
    assert len(found) == 3
    for loss, weighted in found:
        assert loss == pytest.approx(weighted, rel=1e-5)


def test_hidden_state_matching_alone_is_learned(make: Make) -> None:
    trainer = make(LossConfig(kd=0.0, hidden=1.0), max_steps=30, learning_rate=1e-2)
    trainer.train()
    assert logged(trainer)[-1] < 0.8 * logged(trainer)[0]
    assert logged(trainer, "hidden") == pytest.approx(logged(trainer), rel=1e-5)


def test_divergence_is_learned_and_the_base_stays(make: Make) -> None:
    trainer = make(LossConfig(), max_steps=30, learning_rate=1e-2)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert logged(trainer)[-1] < 0.8 * logged(trainer)[0]
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- what is logged


def test_one_line_of_metrics_per_log(make: Make, tmp_path: Path) -> None:
    held_out = {"nll": 2.0, "kl": 0.5, "recovery_nll": None}
    options = {"max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 5}
    trainer = make(evaluate=lambda model: held_out, **options)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 5]  # the last step whatever logging_steps
    names = {"loss", "kd", "ce", "hidden", "grad_norm", "learning_rate", "trained_tokens"}
    names |= {"tokens_per_second", "memory_gib", "seconds_left", "mfu"}
    for line in lines:
        if "loss" in line:
            assert names <= line.keys()
            assert all(math.isfinite(line[name]) for name in names)
            assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 1e3 / 1e6)
    assert lines[2]["seconds_left"] == 0
    (evaluated,) = (line for line in lines if "eval_nll" in line)
    assert evaluated["step"] == 5 and evaluated["eval_kl"] == 0.5
    assert not evaluated.get("eval_recovery_nll")
    assert len(lines) == len(trainer.state.log_history)


def test_time_of_evaluations_does_not_count_as_training(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lp_train.distill.trainer.time.perf_counter", lambda: clock[0])

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock[0] += 2.0

    def slow(model: nn.Module) -> dict[str, float]:
        clock[0] += 100.0
        return {}

    options = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(evaluate=slow, callbacks=(Tick(),), **options)
    trainer.train()
    assert trainer.seconds == pytest.approx(8.0)
    assert logged(trainer, "tokens_per_second") == pytest.approx([8 * LENGTH / 2.0] * 2)
    assert logged(trainer, "seconds_left") == pytest.approx([4.0, 0.0])


def test_evaluating_between_steps_changes_no_loss(make: Make) -> None:
    def held_out(model: nn.Module) -> dict[str, float]:
        return measure(model, packed_rows(5, 300), COLLATE, 2, {"recovered": as_it_is})["recovered"].as_dict()

    options = {"max_steps": 5, "dropout": 0.2, "learning_rate": 1e-2}
    without = make(name="without", **options)
    without.train()
    evaluated = make(name="with", evaluate=held_out, eval_strategy="steps", eval_steps=1, **options)
    evaluated.train()
    assert len(logged(evaluated, "eval_nll")) == 5 and len(set(logged(evaluated, "eval_kl"))) == 5
    assert logged(evaluated) == logged(without)
    assert_same_weights(adapter(evaluated.model), adapter(without.model), 0)


# --- checkpoints


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(make: Make, logging_steps: int) -> None:
    options = {"rows": 20, "max_steps": 9, "dropout": 0.1, "learning_rate": 1e-2, "logging_steps": logging_steps}
    whole = make(name="whole", save_strategy="steps", save_steps=3, **options)  # step 3 ends the first epoch
    whole.train()
    for stopped_at in (3, 6):
        resumed = make(name=f"resumed{stopped_at}", **options)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stopped_at}")
        assert resumed.state.global_step == 9
        assert logged(resumed) == logged(whole)
        assert_same_weights(adapter(resumed.model), adapter(whole.model), 0)
        assert int(resumed.trained_tokens) == int(whole.trained_tokens) == logged(whole, "trained_tokens")[-1]
        assert resumed.seconds > 0


def test_totals_go_on_from_the_checkpoint(make: Make, tmp_path: Path) -> None:
    first = make(name="first", max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    totals = tmp_path / "first" / "checkpoint-2" / "totals.json"
    saved = json.loads(totals.read_text())
    assert saved == {"trained_tokens": logged(first, "trained_tokens")[1], "seconds": pytest.approx(saved["seconds"])}
    totals.write_text(json.dumps({"trained_tokens": 10**6, "seconds": 1000.0}))
    resumed = make(name="resumed", max_steps=4)
    resumed.train(resume_from_checkpoint=str(totals.parent))
    steps = np.diff([0, *logged(first, "trained_tokens")])
    assert int(resumed.trained_tokens) == 10**6 + steps[2:].sum()
    assert 1000 < resumed.seconds < 1060


def test_a_checkpoint_holds_the_adapter_under_its_usual_names(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    unpair_layers(trainer.model)
    expected = {name.replace(".default", ""): value for name, value in adapter(trainer.model).items()}
    assert_same_weights(saved, expected, 0)


# --- divergence of the training


class Spoil(TrainerCallback):
    """Multiplies one weight of the adapter, or its gradient, at one step."""

    def __init__(self, step: int, factor: float, gradient: bool = False) -> None:
        self.step, self.factor, self.gradient = step, factor, gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradient and state.global_step + 1 == self.step:
            for name, parameter in model.named_parameters():
                if "layers.3.mlp.down_proj.lora_B" in name:
                    parameter.data *= self.factor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.gradient and state.global_step + 1 == self.step:
            next(p for p in model.parameters() if p.requires_grad).grad *= self.factor


def newest_is_finite(folder: Path) -> str:
    newest = get_last_checkpoint(str(folder))
    assert newest is not None
    assert all(value.isfinite().all() for value in load_file(f"{newest}/adapter_model.safetensors").values())
    return newest


@pytest.mark.parametrize("factor", [math.nan, 1e4], ids=["nan", "far above the first"])
@pytest.mark.parametrize("logging_steps", [1, 10], ids=["each step logged", "not logged yet"])
def test_a_diverged_run_stops_before_it_is_saved(make: Make, tmp_path: Path, factor: float, logging_steps: int) -> None:
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "logging_steps": logging_steps}
    if logging_steps > 1:
        options["logging_first_step"] = True
    trainer = make(callbacks=(Spoil(5, factor),), learning_rate=1e-3, **options)
    with pytest.raises(TrainingDiverged) as caught:
        trainer.train()
    newest = newest_is_finite(tmp_path / "run")
    assert newest.endswith("checkpoint-4")
    message = str(caught.value)
    assert "at step 5" in message and message.endswith(f"the last checkpoint is at {newest}")
    assert "lower train.learning_rate (now 0.001)" in message and "\n" not in message


def test_a_step_that_ruins_the_weights_is_not_saved(make: Make, tmp_path: Path) -> None:
    """The loss of that step is finite: it was computed before the gradient was applied."""
    trainer = make(callbacks=(Spoil(3, math.nan, gradient=True),), max_steps=9, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingDiverged) as caught:
        trainer.train()
    newest = newest_is_finite(tmp_path / "run")
    assert newest.endswith("checkpoint-2")
    assert str(caught.value).endswith(newest)


def test_without_a_checkpoint_the_message_says_so(make: Make) -> None:
    trainer = make(callbacks=(Spoil(2, math.nan),), max_steps=3)
    with pytest.raises(TrainingDiverged, match=r"loss nan at step 2 .*no checkpoint yet$"):
        trainer.train()


def test_a_loss_that_goes_up_a_little_does_not_stop(make: Make) -> None:
    trainer = make(callbacks=(Spoil(3, 1.5),), max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5


def test_a_first_batch_without_any_trained_token_does_not_stop(make: Make) -> None:
    rows = packed_rows(3, 300).select([2, 2, 2, 2, 0])
    trainer = make(rows=rows, batch=(1, 1), max_steps=5)
    trainer.train()
    assert logged(trainer)[0] == 0 < max(logged(trainer))
