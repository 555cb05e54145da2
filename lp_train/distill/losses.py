"""Losses over one frozen head, in chunks of tokens: the full logits of a batch never exist.

The gradient with respect to the student's hidden states is made chunk by chunk in the forward pass; the head never
gets one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    def of(cls, model: nn.Module) -> Head:
        head = model.get_output_embeddings()
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        bias = None if head.bias is None else head.bias.detach()
        return cls(head.weight.detach(), bias, softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> float32 logits [N, V]."""
        logits = F.linear(hidden, self.weight, self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, from logits [N, V]; returns [N] in nats.

    beta 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher); between them
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, TRL's convention
    (GKD, arXiv 2306.13649, eq. 1). As there, it is not multiplied by temperature squared.
    """
    log_s, log_t = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class LossSums(NamedTuple):
    """Sums over the trained tokens of this micro-batch; ``total`` is weighted and carries the gradient."""

    total: Tensor
    kd: Tensor
    ce: Tensor
    hidden: Tensor


def _chunk(student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig) -> tuple[Tensor, Tensor]:
    logits = head.logits(student)
    kd = ce = logits.new_zeros(())
    if loss.kd:
        with torch.no_grad():
            teacher_logits = head.logits(teacher)
        kd = divergence(logits, teacher_logits, loss.beta, loss.temperature).sum()
    if loss.ce:
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return kd, ce


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig, rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = torch.empty_like(student)
        kd_sum, ce_sum = student.new_zeros(2, dtype=torch.float32)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_()
                kd, ce = _chunk(hidden, teacher[part], labels[part], head, loss)
                total = loss.kd * kd + loss.ce * ce
            (grad[part],) = torch.autograd.grad(total, hidden)
            kd_sum, ce_sum = kd_sum + kd.detach(), ce_sum + ce.detach()
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return loss.kd * kd_sum + loss.ce * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total, None, None, None, None, None


def head_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted divergence plus cross-entropy, summed over N tokens.

    student, teacher: hidden states [N, D] after the final norm; labels [N], the next token, or -100 where there is no
    cross-entropy. Returns (total with gradient to ``student``, divergence, cross-entropy).
    """
    if len(student) == 0 or not (loss.kd or loss.ce):  # such a micro-batch still takes part in its peers' backward
        zero = 0.0 * student.sum().float()
        return zero, zero.detach(), zero.detach()
    return _HeadLoss.apply(student, teacher, labels, head, loss, rows or rows_per_chunk(student.device))


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Relative squared error |s - t|^2 / |t|^2, summed over N tokens; student, teacher [N, D]."""
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()
