"""What the benchmark of several GPUs makes of a profile, and of runs side by side."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.scaling import agreements, covered


def event(begin: float, end: float) -> dict[str, float]:
    return {"ts": begin, "dur": end - begin}


def test_time_is_counted_once_where_kernels_overlap() -> None:
    products = [event(0, 10), event(20, 30), event(22, 25)]
    reduces = [event(5, 15), event(28, 40)]
    assert covered(products) == 20
    assert covered(products + reduces) - covered(products) == 15  # 10 to 15 and 30 to 40: what nothing hides
    assert covered([]) == 0


def test_runs_are_compared_with_the_whole_one_of_their_engine(tmp_path: Path) -> None:
    matrix = torch.arange(1.0, 5.0).view(2, 2)
    for cell, factor in {"one": 1.0, "ddp-whole": 1.01, "ddp-fewer": 1.01}.items():
        for step in (4, 12):
            folder = tmp_path / cell / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            save_file({"lora": matrix * (factor if step == 12 else 9.0)}, folder / "adapter_model.safetensors")
    losses = {"one": {"1": 2.0, "2": 1.0}, "ddp-whole": {"1": 2.0, "2": 1.1}, "ddp-fewer": {"1": 2.0, "2": 1.1}}
    found = agreements(tmp_path, losses)
    assert found["ddp-fewer against ddp-whole"] == {"steps": 2, "loss": 0.0, "adapter": 0.0}
    assert found["ddp-whole against one"] == pytest.approx({"steps": 2, "loss": 0.1, "adapter": 0.01}, rel=1e-4)
    assert len(found) == 2
