"""Losses over one frozen head, in chunks of tokens: the full logits of a batch never exist.

The gradient with respect to the student's hidden states is made in the forward pass, chunk by chunk and in closed
form; the head never gets one.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lp_train.cluster.shard import whole
from lp_train.config import LossConfig
from lp_train.data.rows import IGNORED

ROWS_PER_CHUNK = 1024  # tokens whose logits exist at a time, on a GPU


def rows_per_chunk(device: torch.device) -> int:
    """On a CPU a chunk's logits should stay in its cache: 128 rows are 1.8 times as fast as 1,024 for a vocabulary of
    49,152 (AVX512-BF16, two cores)."""
    return 128 if device.type == "cpu" else ROWS_PER_CHUNK


@dataclass(frozen=True)
class Head:
    """The output projection of a causal LM: weight [V, D], bias [V] or None, soft cap of the logits or None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """Whole also where a model is sharded; then all processes must call it."""
        head = model.get_output_embeddings()
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        bias = None if head.bias is None else whole(head.bias).detach()
        return cls(whole(head.weight).detach(), bias, softcap)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> logits [N, V] before the soft cap, in the precision of the product."""
        return F.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> float32 logits [N, V]."""
        return _capped(self.project(hidden).float(), self.softcap)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> float32 [N, V]; on a GPU the logits never exist in float32."""
        return _log_softmax(_capped(self.project(hidden), self.softcap), 1.0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


class LossSums(NamedTuple):
    """Sums over the trained tokens of this micro-batch; ``total`` is weighted and carries the gradient."""

    total: Tensor
    kd: Tensor
    ce: Tensor
    hidden: Tensor


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence per token [N] in nats, from logits [N, V], and its gradient with respect
    to the student's.

    beta 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher); between them
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, TRL's convention
    (GKD, arXiv 2306.13649, eq. 1). As there, it is not multiplied by temperature squared.
    With q = softmax(student / T) and p = softmax(teacher / T) the gradient times T is

        beta 0:   q - p
        else:     (1 - beta) q (log(q / m) - KL(q || m)),   where m = p and the factor is 1 for beta 1
    """
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p = log_p.exp()
    if beta == 0:  # in place: on a CPU the time is that of touching memory
        value = log_p.sub_(log_q).mul_(p).sum(-1)
        return value, _scaled(log_q.exp_().sub_(p), 1 / temperature)
    q = log_q.exp()
    log_m, weight = log_p, 1.0
    if beta != 1:
        log_m, weight = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta)), 1.0 - beta
    gap = log_q - log_m
    from_student = (q * gap).sum(-1)
    gradient = q * (gap - from_student[:, None]) * (weight / temperature)
    if beta == 1:
        return from_student, gradient
    return beta * (p * (log_p - log_m)).sum(-1) + weight * from_student, gradient


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_scaled(logits, 1 / temperature), -1, dtype=torch.float32)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows whose label is not -100, and its gradient with respect to the logits [N, V]."""
    kept = labels != IGNORED
    index = labels.clamp(min=0)[:, None]
    log_q = _log_softmax(logits, 1.0)
    one_hot = torch.arange(logits.shape[-1], device=logits.device) == index
    gradient = (log_q.exp() - one_hot.float()) * kept[:, None]
    return -(log_q.gather(1, index)[:, 0] * kept).sum(), gradient


def _loss_of_logits(
    student: Tensor, teacher: Tensor | None, labels: Tensor, loss: LossConfig, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From logits [N, V] before the soft cap: divergence and cross-entropy summed, and the gradient of their weighted
    sum with respect to the student's, in the logits' precision."""
    logits, gradient = _capped(student, softcap), None
    kd = ce = torch.zeros((), device=student.device)
    if teacher is not None:
        per_token, of_kd = divergence(logits, _capped(teacher, softcap), loss.beta, loss.temperature)
        kd, gradient = per_token.sum(), _scaled(of_kd, loss.kd)
    if loss.ce:
        ce, of_ce = _cross_entropy(logits, labels)
        of_ce = _scaled(of_ce, loss.ce)
        gradient = of_ce if gradient is None else gradient + of_ce
    assert gradient is not None
    if softcap is not None:
        gradient = gradient * (1 - (logits / softcap).square())
    return kd, ce, gradient.to(student.dtype)


@functools.cache
def _compiled_loss_of_logits() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_loss_of_logits, dynamic=False)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
        head, loss, rows, compile = options
        grad = torch.empty_like(student)
        kd_sum, ce_sum = student.new_zeros(2, dtype=torch.float32)
        of_logits = _compiled_loss_of_logits() if compile else _loss_of_logits
        chunks = zip(*(x.split(rows) for x in (student, teacher, labels, grad)), strict=True)
        for ours, theirs, wanted, grad_chunk in chunks:
            target = head.project(theirs) if loss.kd else None
            kd, ce, grad_logits = of_logits(head.project(ours), target, wanted, loss, head.softcap)
            grad_chunk.copy_(grad_logits @ head.weight)
            kd_sum, ce_sum = kd_sum + kd, ce_sum + ce
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return loss.kd * kd_sum + loss.ce * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total, *[None] * 6


def head_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    head: Head,
    loss: LossConfig,
    rows: int | None = None,
    compile: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted divergence plus cross-entropy, summed over N tokens: (total with gradient to ``student``, divergence,
    cross-entropy). student, teacher: hidden states [N, D] after the final norm; labels [N], the next token, or -100
    where there is no cross-entropy; ``rows``: tokens whose logits exist at a time."""
    if len(student) == 0 or not (loss.kd or loss.ce):  # such a micro-batch still takes part in its peers' backward
        zero = 0.0 * student.sum().float()
        return zero, zero.detach(), zero.detach()
    rows = rows or rows_per_chunk(student.device)
    if compile and (missing := -len(student) % rows):  # whole chunks: one shape for the compiler
        student, teacher = (F.pad(states, (0, 0, 0, missing)) for states in (student, teacher))
        labels = F.pad(labels, (0, missing), value=IGNORED)
    return _HeadLoss.apply(student, teacher, labels, head, loss, rows, compile)


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relative squared error |s - t|^2 / |t|^2, summed over N tokens; student, teacher [N, D]."""
    student, teacher = student.float(), teacher.float()
    size = teacher.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / size).sum()
