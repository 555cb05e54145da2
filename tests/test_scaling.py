"""The calculator for many GPUs against what two gloo processes hold and send, and its page in the recipes."""

import json
import re
from pathlib import Path

import pytest
from bench_cases import Configure, configure
from launched import ROOT, ends, start
from scaling_worker import build
from test_bench_shapes import PUBLISHED

import bench
from benchmarks.many_gpus import sent_per_gpu
from lp_train.bench.memory import GIB
from lp_train.bench.scaling import COPY, SHARDED, STATES, WEIGHTS, collectives, memory_per_gpu
from lp_train.config import config_to_yaml
from lp_train.distill.compiled import Engine

__all__ = ["configure"]
PATHS = ":".join(str(ROOT / part) for part in (".", "scripts", "tests"))
WORKER = str(Path(__file__).with_name("scaling_worker.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_hold_and_send_what_is_computed(kind: str, configure: Configure, tmp_path: Path) -> None:
    """Layer 0 below the pairs, layer 5 after them: units of three sizes, counted without and with checkpointing."""
    config = configure("plan.pairs=1:5")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    worker = [WORKER, kind, str(tmp_path / "config.yaml")]
    codes, output = ends(start(worker, 2, PYTHONPATH=PATHS))
    assert codes == [0, 0], output
    cases = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(cases) == 2
    model = build(config)
    items = memory_per_gpu(model, config, kind, 2, rows=1, engine=Engine())
    for found in cases:
        assert found["processes"] == 2
        assert found["payload"] == collectives(model, kind)  # checkpointed or not
        held = [found[name] for name in ("frozen", "trained", "gradients", "optimizer")]
        assert [GIB * items[name] for name in WEIGHTS + STATES] == held


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_two_processes_of_deepspeed_send_what_is_computed(kind: str, configure: Configure, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = configure("plan.pairs=1:5")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    worker = [WORKER, kind, str(tmp_path / "config.yaml")]
    codes, output = ends(start(worker, 2, PYTHONPATH=PATHS, ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu"))
    assert codes == [0, 0], output
    cases = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    model = build(config)
    for found, checkpointed in zip(cases, (False, True), strict=True):
        assert found["processes"] == 2
        assert found["payload"] == pytest.approx(collectives(model, kind, checkpointed=checkpointed), rel=0.02)


def test_a_ring_sends_the_tensor_once_and_an_all_reduce_twice() -> None:
    assert sent_per_gpu({"all-gather": 100, "reduce-scatter": 100, "all-reduce": 100}, 4) == 300
    assert sent_per_gpu({"all-reduce": 100}, 1) == 0


def test_only_what_is_sharded_shrinks_with_more_gpus(configure: Configure) -> None:
    config = configure("plan.pairs=1:5")
    model, grown = build(config), {}
    for kind, sharded in SHARDED.items():
        few, many = (memory_per_gpu(model, config, kind, gpus, rows=1, engine=Engine()) for gpus in (2, 8))
        assert few.keys() == many.keys()
        grown[kind] = {name for name in few if many[name] != few[name]}
        assert grown[kind] - {COPY} == set(sharded)
        assert all(many[name] == few[name] / 4 for name in grown[kind])
    assert COPY in grown["zero2"] & grown["zero3"]


def test_accumulated_micro_batches_gather_again_and_reduce_once(configure: Configure) -> None:
    model = build(configure("plan.pairs=1:5"))
    once, twice = (collectives(model, "fsdp2", accumulation) for accumulation in (1, 2))
    assert twice == {"all-gather": 2 * once["all-gather"], "reduce-scatter": once["reduce-scatter"]}
    assert collectives(model, "ddp", 2) == collectives(model, "ddp", 1)


def test_the_page_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = ROOT / "recipes" / "scaling" / "README.md"
    (command,) = re.findall(r"^    python scripts/bench.py (scaling .*) --page \S+$", page.read_text(), re.MULTILINE)
    arguments = [str(ROOT / part) if part.startswith("configs/") else part for part in command.split()]
    copy = tmp_path / "page.md"
    copy.write_text(re.sub("(?s)(?<=scaling -->\n).*(?=<!-- end)", "", page.read_text()))
    assert bench.main([*arguments, "--page", str(copy)]) == 0
    assert copy.read_text() == page.read_text()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["computed"]
    assert [shape["parameters"] for shape in found] == [PUBLISHED[shape["shape"]] for shape in found]


def test_an_unknown_shape_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["scaling", str(ROOT / "configs" / "llama8b.yaml"), "--shapes", "none"]) == 2
    assert "--shapes 'none': no such file in configs/shapes; use some of Llama" in capsys.readouterr().err
