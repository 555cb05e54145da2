"""Where a profiled step spends its time, of events as the profiler gives them."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import stepper


def test_kernels_of_one_shortened_name_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.autograd.DeviceType.CUDA

    def event(key: str, count: int, us: float, device: Any = cuda) -> SimpleNamespace:
        return SimpleNamespace(key=key, count=count, self_device_time_total=us, device_type=device)

    events = [event("a" * 80 + "1", 2, 10.0), event("ncclAllReduce", 3, 30.0), event("a" * 80 + "2", 4, 20.0)]
    events += [event("##span", 1, 99.0), event("aten::mm", 1, 50.0, torch.autograd.DeviceType.CPU)]
    monkeypatch.setattr(torch.profiler, "profile", lambda: nullcontext(SimpleNamespace(key_averages=lambda: events)))
    found = stepper.kernels(lambda: None, most=2)
    assert found["kernels"] == [["ncclAllReduce", 3, 0.03], ["a" * 80, 4, 0.02]]
    assert (found["all_reduces"], found["all_reduce_ms"]) == (3, 0.03)
    assert found["other_kernels_ms"] == pytest.approx(0.03)


def test_of_several_ranks_the_step_that_waited_least(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([16.0, 0.5, 2.0])
    monkeypatch.setattr(stepper, "PROFILED", 3)
    monkeypatch.setattr(stepper, "_kernels", lambda step, most: {"all_reduce_ms": next(waited)})
    assert stepper.kernels(lambda: None) == {"all_reduce_ms": 0.5}
