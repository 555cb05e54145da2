"""DDP, FSDP2, ZeRO-2 and ZeRO-3 on two gloo processes against one, through the trainer and the program itself."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from engine_worker import cases, run
from launched import ENGINES, ends, start_engine
from safetensors.torch import load_file
from test_two_processes import assert_same_figures
from tiny_run import save_model
from tiny_trainer import assert_same_weights
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lp_train.cluster import engine

pytestmark = pytest.mark.slow
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def needs(name: str) -> Any:
    missing = name.startswith("ZeRO") and not HAS_DEEPSPEED
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="deepspeed is not installed"))


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters and figures of each case, by one process."""
    from accelerate import PartialState

    results = tmp_path_factory.mktemp("alone")
    for name, case in cases():
        run(model, results, name, case, PartialState(cpu=True))
    return results


@pytest.mark.parametrize("name", [needs(name) for name in ENGINES])
def test_an_engine_takes_the_step_of_one_process(name: str, model: Path, alone: Path, tmp_path: Path) -> None:
    """Gradient and saved adapter of each case: the adapter is the start less the gradient of one global batch."""
    codes, output = ends(start_engine("engine_worker.py", name, str(model), str(tmp_path)))
    assert codes == [0, 0], output
    for case, _ in cases():
        found, expected = (json.loads((folder / f"{case}.json").read_text()) for folder in (tmp_path, alone))
        assert (found["engine"], found["num_processes"], found["backend"]) == (name, 2, "gloo")
        assert found["share_held"] == pytest.approx(0.5 if name in engine.IN_PARTS else 1.0, abs=0.01)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert_same_figures(found["figures"], expected["figures"])
        assert_same_weights(saved(tmp_path / case), saved(alone / case))


def test_each_case_has_a_gradient_in_every_adapter(alone: Path, model: Path) -> None:
    """Without one the step would leave it as it was, under every engine alike."""
    names = [name for name, _ in cases()]
    for a, b in zip(names, names[3:], strict=False):  # lp and par start from the same adapter
        ours, theirs = saved(alone / a), saved(alone / b)
        assert all(not ours[name].equal(theirs[name]) for name in ours)


def test_a_pair_cut_into_two_units_fails(model: Path, tmp_path: Path) -> None:
    """Why ``shard_layers`` exists: the second layer meets the shards of the first."""
    codes, output = ends(start_engine("engine_worker.py", "FSDP2", str(model), str(tmp_path), "layers"))
    assert codes != [0, 0] and "mixed torch.Tensor and DTensor" in output
