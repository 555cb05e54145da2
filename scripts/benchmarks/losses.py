"""Time and memory of the loss over one frozen head, forward and backward: ours, TRL's kernel, checkpointed chunks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.baselines import trl_divergence
from benchmarks.training import free_memory, origin
from lp_train.config import LossConfig
from lp_train.distill.losses import Head, head_loss

LOSSES: dict[str, tuple[LossConfig, float | None]] = {  # with the soft cap of the logits
    "forward KL": (LossConfig(), None),
    "reverse KL": (LossConfig(beta=1.0), None),
    "JSD(0.5)": (LossConfig(beta=0.5), None),
    "forward KL, temperature 2": (LossConfig(temperature=2.0), None),
    "forward KL, soft cap 30": (LossConfig(), 30.0),
    "cross-entropy": (LossConfig(kd=0.0, ce=1.0), None),
    "forward KL + cross-entropy": (LossConfig(ce=1.0), None),
}
CHUNK = 1024  # rows of the plain way
CHECKED = 256  # rows whose gradient is compared

Way = Callable[[Tensor, Tensor, Tensor, Head, LossConfig], Tensor]


def ours(student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig) -> Tensor:
    return head_loss(student, teacher, labels, head, loss, compile=student.is_cuda)[0]


def trl(student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig) -> Tensor:
    return trl_divergence(student, teacher, (head.weight, head.weight), loss, head.softcap)


def plain_chunks(student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig) -> Tensor:
    parts = zip(student.split(CHUNK), teacher.split(CHUNK), labels.split(CHUNK), strict=True)
    sums = [checkpoint(plain, s, t, wanted, head, loss, use_reentrant=False) for s, t, wanted in parts]
    return torch.stack(sums).sum()


def plain(student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig) -> Tensor:
    """The formulas on whole logits, for autograd; independent of ``distill/losses.py``."""
    logits, target = (_logits(hidden, head) for hidden in (student, teacher))
    total = logits.new_zeros(())
    if loss.kd:
        q, p = ((z / loss.temperature).log_softmax(-1) for z in (logits, target))
        total = loss.kd * _divergence(q, p, loss.beta)
    return total + loss.ce * F.cross_entropy(logits, labels, reduction="sum") if loss.ce else total


def _logits(hidden: Tensor, head: Head) -> Tensor:
    logits = F.linear(hidden, head.weight).float()
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def _divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
        return F.kl_div(log_y, log_x, reduction="sum", log_target=True)

    if beta in (0.0, 1.0):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


WAYS: dict[str, Way] = {"ours": ours, "TRL": trl, "plain chunks": plain_chunks}


def run(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, Any]:
    """Every loss in every way; TRL has divergences only."""
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=device)

    weight = (2 * normal(vocab, width) / math.sqrt(width)).to(dtype)
    teacher = normal(rows, width)
    student = (teacher + 0.3 * normal(rows, width)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=make, device=device)
    found: dict[str, Any] = {"rows": rows, "width": width, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
    found |= {**origin(device), "checked": min(CHECKED, rows), "losses": {}}
    for name, (loss, softcap) in LOSSES.items():
        head, entries = Head(weight, softcap=softcap), {}
        for way, function in WAYS.items():
            if way == "TRL" and loss.ce:
                entries[way] = {"error": "not supported"}
                continue
            entries[way] = measure(function, student, teacher.to(dtype), labels, head, loss, repeats)
        found["losses"][name] = entries
    return found


def measure(
    way: Way, student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig, repeats: int
) -> dict[str, Any]:
    """Milliseconds, memory beyond the inputs, and the gradient's error on the first rows."""
    try:
        free_memory()
        part = slice(0, CHECKED)
        found = gradient(way, student[part], teacher[part], labels[part], head, loss).float()
        exact_head = Head(head.weight.float(), softcap=head.softcap)
        exact = gradient(plain, student[part].float(), teacher[part].float(), labels[part], exact_head, loss)
        error = ((found - exact).norm() / exact.norm()).item()
        del found, exact, exact_head
        ms, extra = timed(lambda: gradient(way, student, teacher, labels, head, loss), student.device, repeats)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    return {"ms": ms, "extra_gib": extra, "gradient_error": error}


def gradient(way: Way, student: Tensor, teacher: Tensor, labels: Tensor, head: Head, loss: LossConfig) -> Tensor:
    hidden = student.detach().requires_grad_()
    (found,) = torch.autograd.grad(way(hidden, teacher, labels, head, loss), hidden)
    return found


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """(ms of one call, GiB at its peak beyond what was there before; None on a CPU)."""
    on_gpu = device.type == "cuda"
    for _ in range(2 if on_gpu else 1):  # compiles
        call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - start) / repeats
    return ms, (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
