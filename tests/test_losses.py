"""The losses against formulas written here in float64, against plain autograd on whole logits, and against TRL."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from lp_train.config import LossConfig
from lp_train.distill import losses
from lp_train.distill.losses import IGNORED, Head, divergence, head_loss, hidden_loss

WIDTH, VOCAB = 16, 61


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head(bias: bool = False, softcap: float | None = None) -> Head:
    return Head(normal(VOCAB, WIDTH, seed=1, scale=0.5), normal(VOCAB, seed=2) if bias else None, softcap)


def states(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher hidden states, and labels of which every third is ignored."""
    labels = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(5))
    labels[::3] = IGNORED
    return normal(tokens, WIDTH, seed=3).requires_grad_(), normal(tokens, WIDTH, seed=4), labels


def assert_close(ours: Tensor, reference: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value."""
    error = (ours.double() - reference.double()).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert error < tolerance, f"relative error {error:.1e}"


# --- the references, in float64: probabilities first, logarithms of them after


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    exps = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    return exps / exps.sum(-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def reference_divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    s, t = probabilities(student, temperature), probabilities(teacher, temperature)
    if beta == 0:
        return kl(t, s)
    if beta == 1:
        return kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def reference_logits(hidden: Tensor, of: Head) -> Tensor:
    logits = hidden @ of.weight.double().T
    logits = logits if of.bias is None else logits + of.bias.double()
    return logits if of.softcap is None else of.softcap * (logits / of.softcap).tanh()


def reference_loss(student: Tensor, teacher: Tensor, labels: Tensor, of: Head, loss: LossConfig) -> tuple[Tensor, ...]:
    """(total, kd, ce) over whole logits, with plain autograd."""
    ours, theirs = reference_logits(student, of), reference_logits(teacher, of)
    kd = reference_divergence(ours, theirs, loss.beta, loss.temperature).sum()
    kept = labels != IGNORED
    ce = -probabilities(ours[kept], 1.0).gather(1, labels[kept, None]).log().sum()
    return loss.kd * kd + loss.ce * ce, kd, ce


# --- divergence


@settings(deadline=None, max_examples=60)
@given(
    beta=st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99),
    temperature=st.floats(0.3, 5.0),
    scale=st.floats(0.01, 6.0),
    seed=st.integers(0, 2**16),
)
def test_divergence_equals_its_formula(beta: float, temperature: float, scale: float, seed: int) -> None:
    student, teacher = (normal(5, 23, seed=seed + i, scale=scale) for i in range(2))
    found, _ = divergence(student, teacher, beta, temperature)
    expected = reference_divergence(student.double(), teacher.double(), beta, temperature)
    assert found.shape == (5,)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6)


def test_forward_and_reverse_are_told_apart() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])  # 1/2, 1/2 and 3/4, 1/4
    forward, reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert divergence(student, teacher, 0.0)[0].item() == pytest.approx(forward, rel=1e-5)
    assert divergence(student, teacher, 1.0)[0].item() == pytest.approx(reverse, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_of_equal_logits_is_zero(beta: float) -> None:
    logits = normal(4, 50, seed=0, scale=10)
    assert divergence(logits, logits.clone(), beta)[0].abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_beta_and_temperature_mean_what_they_do_in_trl(beta: float, temperature: float) -> None:
    (student, teacher, labels), of = states(12), head(bias=True)
    mine, _ = divergence(of.logits(student), of.logits(teacher), beta, temperature)
    chunked, _ = ChunkedDivergenceFunction.apply(
        student, of.weight, of.bias, teacher, of.weight, of.bias, beta, temperature
    )
    torch.testing.assert_close(mine, chunked, rtol=1e-4, atol=1e-6)
    loss = LossConfig(beta=beta, temperature=temperature)
    (mine_grad,) = torch.autograd.grad(head_loss(student, teacher, labels, of, loss)[0], student)
    (trl_grad,) = torch.autograd.grad(chunked.sum(), student)
    assert_close(mine_grad, trl_grad)


# --- the head


def test_soft_cap_and_bias_of_the_head() -> None:
    hidden = normal(9, WIDTH, seed=3, scale=4)
    for of in (head(), head(bias=True), head(softcap=2.0), head(bias=True, softcap=2.0)):
        assert_close(of.logits(hidden), reference_logits(hidden.double(), of))
    assert head(softcap=2.0).logits(hidden).abs().max() <= 2.0


def test_logits_are_float32_whatever_the_weights() -> None:
    of = Head(normal(VOCAB, WIDTH, seed=1).bfloat16())
    assert of.logits(normal(3, WIDTH, seed=3).bfloat16()).dtype == torch.float32


def test_head_of_a_model_gives_the_logits_of_the_model(tiny_llama: LlamaForCausalLM) -> None:
    options: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = Gemma2Config(**options, num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    config.final_logit_softcapping = 0.02
    biased = LlamaForCausalLM(tiny_llama.config).eval()
    biased.lm_head.bias = nn.Parameter(normal(tiny_llama.config.vocab_size, seed=2))
    for model in (tiny_llama, biased, Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()):
        with torch.no_grad():
            out = model(torch.arange(1, 12)[None], output_hidden_states=True, use_cache=False)
        assert_close(Head.of(model).logits(out.hidden_states[-1]), out.logits, 1e-6)


# --- head_loss against plain autograd


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 50),
    beta=st.sampled_from([0.0, 1.0]) | st.floats(0.05, 0.95),
    temperature=st.floats(0.5, 4.0),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (2.0, 0.5)]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
)
def test_head_loss_and_its_gradient_equal_plain_autograd(
    tokens: int,
    rows: int,
    beta: float,
    temperature: float,
    weights: tuple[float, float],
    bias: bool,
    softcap: float | None,
) -> None:
    (student, teacher, labels), of = states(tokens), head(bias, softcap)
    loss = LossConfig(kd=weights[0], ce=weights[1], beta=beta, temperature=temperature)
    total, kd, ce = head_loss(student, teacher, labels, of, loss, rows)
    (3 * total).backward()
    plain = student.detach().double().requires_grad_()
    expected = reference_loss(plain, teacher.double(), labels, of, loss)
    (3 * expected[0]).backward()
    assert student.grad is not None and plain.grad is not None
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-5, atol=1e-5 * plain.grad.abs().max().item())
    for mine, theirs, weight in zip((total, kd, ce), expected, (1.0, *weights), strict=True):
        torch.testing.assert_close(mine.double(), theirs if weight else torch.zeros_like(theirs), rtol=1e-4, atol=1e-5)
    assert not kd.requires_grad and not ce.requires_grad


def test_cross_entropy_leaves_ignored_labels_out() -> None:
    (student, teacher, labels), of = states(10), head()
    total, kd, ce = head_loss(student, teacher, labels, of, LossConfig(kd=0.0, ce=1.0), rows=4)
    total.backward()
    kept = labels != IGNORED
    torch.testing.assert_close(ce, F.cross_entropy(of.logits(student.detach())[kept], labels[kept], reduction="sum"))
    assert kd == 0
    assert student.grad is not None
    assert student.grad[~kept].abs().max() == 0 and (student.grad[kept].abs().amax(1) > 0).all()


def test_all_labels_ignored_gives_zero_cross_entropy() -> None:
    student, teacher, labels = states(7)
    total, _, ce = head_loss(student, teacher, torch.full_like(labels, IGNORED), head(), LossConfig(kd=0.0, ce=1.0), 3)
    total.backward()
    assert student.grad is not None
    assert total == 0 and ce == 0 and student.grad.abs().max() == 0


def test_no_token_gives_a_zero_loss_that_still_reaches_the_parameters() -> None:
    layer, empty = nn.Linear(WIDTH, WIDTH), torch.zeros(0, WIDTH)
    total, kd, ce = head_loss(layer(empty), empty, torch.zeros(0, dtype=torch.long), head(), LossConfig(ce=1.0))
    assert (total, kd, ce) == (0, 0, 0)
    total.backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() == 0


def test_the_chunk_size_does_not_change_the_loss() -> None:
    (student, teacher, labels), of, loss = states(37), head(), LossConfig(ce=0.5)
    whole, *_ = head_loss(student, teacher, labels, of, loss, 37)
    (whole_grad,) = torch.autograd.grad(whole, student)
    for rows in (1, 8, 36, 100, None):
        total, *_ = head_loss(student, teacher, labels, of, loss, rows)
        torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
        assert_close(torch.autograd.grad(total, student)[0], whole_grad, 1e-6)


@pytest.mark.parametrize("compile", [False, True])
def test_a_compiled_loss_sees_chunks_of_one_size_and_is_the_same(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def compiled(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(len(logits))
        return losses._loss_of_logits(logits, *args)

    monkeypatch.setattr(losses, "_compiled_loss_of_logits", lambda: compiled)
    (student, teacher, labels), of, loss = states(37), head(bias=True), LossConfig(ce=0.5)
    plain, *_ = head_loss(student, teacher, labels, of, loss, 16)
    (plain_grad,) = torch.autograd.grad(plain, student)
    assert sizes == []
    found, *_ = head_loss(student, teacher, labels, of, loss, 16, compile)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    assert_close(torch.autograd.grad(found, student)[0], plain_grad, 1e-6)
    assert sizes == ([16] * 3 if compile else [])


def test_the_head_never_gets_a_gradient(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.requires_grad_(True)
    of = Head.of(tiny_llama)
    student = normal(6, 32, seed=1).requires_grad_()
    labels = torch.arange(6)
    total, _, _ = head_loss(student, normal(6, 32, seed=2), labels, of, LossConfig(ce=1.0), 4)
    total.backward()
    assert tiny_llama.lm_head.weight.requires_grad and tiny_llama.lm_head.weight.grad is None
    weight, bias = normal(VOCAB, WIDTH, seed=1).requires_grad_(), normal(VOCAB, seed=2).requires_grad_()
    student, teacher, labels = states(6)
    head_loss(student, teacher.requires_grad_(), labels, Head(weight, bias), LossConfig(ce=1.0), 4)[0].backward()
    assert weight.grad is None and bias.grad is None and teacher.grad is None and student.grad is not None


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [WIDTH, 2 * WIDTH])  # at least the width: else the weight itself is the largest
def test_no_tensor_is_larger_than_one_chunk_of_logits(beta: float, rows: int) -> None:
    tokens, vocab = 20 * rows, 1024
    student, teacher = normal(tokens, WIDTH, seed=1).requires_grad_(), normal(tokens, WIDTH, seed=2)
    weight = normal(vocab, WIDTH, seed=3)
    with Largest() as spy:
        total, _, _ = head_loss(student, teacher, torch.arange(tokens), Head(weight), LossConfig(beta=beta, ce=1), rows)
        total.backward()
    assert spy.elements == rows * vocab


def test_only_the_gradient_is_kept_for_the_backward() -> None:
    student, teacher, labels = states(64)
    total, _, _ = head_loss(student, teacher, labels, head(), LossConfig(ce=0.5), 8)
    assert [tensor.shape for tensor in total.grad_fn.saved_tensors] == [student.shape]  # type: ignore[union-attr]


# --- hidden states


def test_hidden_loss_is_the_relative_squared_error() -> None:
    student, teacher = normal(11, WIDTH, seed=1).requires_grad_(), normal(11, WIDTH, seed=2, scale=3)
    found = hidden_loss(student, teacher)
    found.backward()
    plain = student.detach().double().requires_grad_()
    expected = sum(((s - t) @ (s - t)) / (t @ t) for s, t in zip(plain, teacher.double(), strict=True))
    assert isinstance(expected, Tensor)
    expected.backward()
    assert student.grad is not None and plain.grad is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert_close(student.grad, plain.grad, 1e-6)
    assert hidden_loss(teacher, teacher) == 0
    assert hidden_loss(teacher[:0], teacher[:0]) == 0


def test_hidden_loss_of_half_precision_states_is_summed_in_float32() -> None:
    teacher = normal(5, WIDTH, seed=2).half()
    assert hidden_loss(300 * teacher, 299 * teacher).isfinite()  # squares of 300 summed would be infinite in float16
