"""PairedTrainer on a tiny model: the gradient of a global batch, the parts of the loss, what is logged."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_trainer import ALL, COLLATE, LENGTH, Make, adapter, assert_same_weights, logged, packed_rows, trainer_maker
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lp_train.config import LossConfig
from lp_train.distill.trainer import PairedTrainer
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.pairing import sequential

EXACT: dict[str, Any] = {  # plain gradient descent: the step is the gradient
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 1,
}


@pytest.fixture
def make(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Make:
    return trainer_maker(tiny_llama, tiny_tokenizer, tmp_path)


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


def test_every_batch_of_an_epoch_has_the_same_shape(make: Make) -> None:
    trainer = make(rows=11, batch=(4, 2), max_steps=-1, num_train_epochs=1)
    batches = list(trainer.get_train_dataloader())
    assert [batch["input_ids"].shape for batch in batches] == [(4, LENGTH)] * 3
    assert (batches[2]["labels"][3] == -100).all()


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
    names |= {"tokens_per_second", "trained_tokens_per_second", "memory_gib", "seconds_left", "mfu"}
    for line in lines:
        if "loss" in line:
            assert names <= line.keys()
            assert all(math.isfinite(line[name]) for name in names)
            flops = line["tokens_per_second"] * 1e3 + line["trained_tokens_per_second"] * 500
            assert line["mfu"] == pytest.approx(flops / 1e6)
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
