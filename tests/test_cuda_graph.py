"""What surrounds a CUDA graph, on a CPU: a stand-in runs the loss again, into the tensors of the capture."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_trainer import COLLATE, Make, adapter, assert_same_weights, logged, packed_rows, trainer_maker
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lp_train.distill import cuda_graph
from lp_train.distill.cuda_graph import Captured, GraphedLoss, Inputs, fill
from lp_train.distill.losses import LossSums


class RunAgain(GraphedLoss):
    """Like a graph: reads its own inputs only, and overwrites the results of its last replay."""

    captures = 0

    def capture(self, inputs: Inputs) -> Captured:
        type(self).captures += 1
        static = {name: value.clone() for name, value in inputs.items()}
        sums, gradients = self.loss_and_gradients(static)

        def replay() -> None:
            found, changed = self.loss_and_gradients(static)
            for old, new in itertools.chain(zip(sums, found, strict=True), zip(gradients, changed, strict=True)):
                if old is not None and new is not None:
                    old.copy_(new)

        return Captured(replay, static, sums, gradients)


@pytest.fixture
def make(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    monkeypatch.setattr("lp_train.distill.trainer.GraphedLoss", RunAgain)
    monkeypatch.setattr(cuda_graph, "ROWS_PER_CHUNK", 16)
    RunAgain.captures = 0
    return trainer_maker(tiny_llama, tiny_tokenizer, tmp_path)


@pytest.mark.parametrize("batch", [(4, 2), (2, 4), (1, 8)])
def test_training_is_that_without_a_graph(make: Make, batch: tuple[int, int]) -> None:
    plain = make(batch=batch, rows=16, max_steps=4, learning_rate=1e-2, name="plain")
    graphed = make(batch=batch, rows=16, max_steps=4, learning_rate=1e-2, name="graphed", cuda_graph=True)
    plain.train(), graphed.train()
    for name in ("loss", "kd", "ce", "hidden", "grad_norm"):
        assert logged(graphed, name) == pytest.approx(logged(plain, name), rel=1e-5), name
    assert_same_weights(adapter(graphed.model), adapter(plain.model))
    assert 1 <= RunAgain.captures < 8 * 4 // 2  # sizes are few: not one for each micro-batch


def test_filled_batches() -> None:
    batch = COLLATE(list(packed_rows(8, 40)))
    filled = fill(batch)
    trained, mask, starts = filled["trained"], filled["trained_mask"], filled["cu_seq_lens"]
    assert len(trained) == len(mask) == cuda_graph.ROWS_PER_CHUNK
    assert torch.equal(trained[mask], batch["trained"]) and mask[: len(batch["trained"])].all()
    assert len(starts) == 32 and starts.dtype == torch.int32  # 8 rows of 2 documents and padding, 25 starts
    assert torch.equal(starts[: len(batch["cu_seq_lens"])], batch["cu_seq_lens"])
    assert (starts[len(batch["cu_seq_lens"]) :] == batch["input_ids"].numel()).all()


def square(inputs: Inputs) -> LossSums:
    total = (weight * inputs["input_ids"]).square().sum()
    return LossSums(total, total.detach(), total.detach(), total.detach())


weight = torch.nn.Parameter(torch.tensor(3.0))
unused = torch.nn.Parameter(torch.tensor(1.0))


def inputs_of(values: Sequence[float]) -> dict[str, Tensor]:
    starts = torch.tensor([0, len(values)], dtype=torch.int32)
    return {"input_ids": torch.tensor(values), "trained": torch.arange(1), "cu_seq_lens": starts}


def test_gradients_outlive_the_next_replay_and_follow_the_outer_factor() -> None:
    weight.grad = unused.grad = None
    graphed = RunAgain(square, [weight, unused])
    (0.5 * graphed(inputs_of([1.0, 2.0])).total).backward()
    first = weight.grad
    assert first is not None and first.item() == pytest.approx(0.5 * 2 * 3 * 5)
    (0.5 * graphed(inputs_of([0.0, 1.0])).total).backward()
    assert weight.grad.item() == pytest.approx(0.5 * 2 * 3 * (5 + 1)) and unused.grad is None


def test_without_a_graph_where_the_capture_fails_or_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(RunAgain):
        def capture(self, inputs: Inputs) -> Captured:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore lines")

    graphed = Fails(square, [weight])
    with pytest.warns(UserWarning, match="CUDA out of memory; training goes on without.*train.cuda_graph false"):
        assert graphed(inputs_of([1.0])).total.item() == 9
    assert graphed(inputs_of([2.0])).total.item() == 36  # and no second warning
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 1)
    graphed = RunAgain(square, [weight])
    assert [graphed(inputs_of([1.0] * n)).total.item() for n in (1, 2, 1)] == [9, 18, 9]
    assert len(graphed.graphs) == 1


def test_weights_are_cast_anew_in_every_replay() -> None:
    linear = torch.nn.Linear(4, 4)

    def loss(inputs: Inputs) -> LossSums:
        total = linear(inputs["input_ids"]).sum().float()
        return LossSums(total, *[total.detach()] * 3)

    graphed = RunAgain(loss, list(linear.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        first = graphed(inputs_of([1.0, 1.0, 1.0, 1.0])).total.item()
        linear.weight.data += 1
        assert graphed(inputs_of([1.0, 1.0, 1.0, 1.0])).total.item() == pytest.approx(first + 16, rel=1e-2)
