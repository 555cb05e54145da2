"""FSDP2 on two gloo processes, through the functions that the trainer calls, against one whole model."""

import json
from pathlib import Path

import pytest
from launched import ROOT, ends, start

WORKER = str(Path(__file__).with_name("sharded_worker.py"))
PYTHONPATH = f"{ROOT}:{ROOT / 'tests'}"


@pytest.mark.slow
def test_sharded_weights_give_the_gradient_of_whole_ones() -> None:
    """Both algebras, without and with gradient checkpointing, in training and in evaluation."""
    codes, output = ends(start([WORKER, "pairs"], 2, PYTHONPATH=PYTHONPATH))
    assert codes == [0, 0], output
    cases = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(cases) == 4
    for found in cases:
        assert found["processes"] == 2 and found["sharded"] == found["parameters"]
        assert found["held"] == found["all"] / 2
        assert found["error"] < 1e-5
        assert found["figures"] == pytest.approx(found["expected"], rel=1e-5)


@pytest.mark.slow
def test_a_pair_cut_into_two_units_fails() -> None:
    """Why :func:`shard_layers` exists: the second layer meets the shards of the first."""
    codes, output = ends(start([WORKER, "layers"], 2, PYTHONPATH=PYTHONPATH))
    assert codes != [0, 0] and "mixed torch.Tensor and DTensor" in output
