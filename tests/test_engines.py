"""DDP, FSDP2, ZeRO-2 and ZeRO-3 on two gloo processes against one, through the trainer and the program itself."""

import importlib.util
import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from bench_cases import Configure, configure
from engine_worker import cases, run
from eval_files import write_eval_files
from launched import ENGINES, Program, ends, logged, losses, start_engine, weights
from safetensors.torch import load_file
from test_two_processes import assert_same_figures
from tiny_run import save_model
from tiny_trainer import assert_same_weights, paired_with_adapter
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lp_train import finetune
from lp_train.adapters import check_adapter
from lp_train.cluster import engine, shard
from lp_train.cluster.launch import check_engine
from lp_train.cluster.shard import whole_state
from lp_train.errors import UserError
from lp_train.pairing import PairPlan

__all__ = ["configure"]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def needs(name: str) -> Any:
    missing = name.startswith("ZeRO") and not HAS_DEEPSPEED
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="deepspeed is not installed"))


def test_a_call_inside_a_cut_model_has_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's FSDP2 fails on a GPU where a forward has none."""
    monkeypatch.setattr(shard, "in_parts", lambda model: True)
    seen: list[int] = []
    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    assert shard.inside(model, lambda: "without") == "without"
    assert shard.inside(model, lambda a, b: a + b, 1, 2) == 3
    assert seen == [1, 3]


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters and figures of each case, by one process."""
    results = tmp_path_factory.mktemp("alone")
    for name, case in cases():
        run(model, results, name, case, PartialState(cpu=True))
    return results


@pytest.fixture(scope="module")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The adapter that every case begins with, whatever its algebra."""
    folder = tmp_path_factory.mktemp("start")
    paired_with_adapter(LlamaForCausalLM.from_pretrained(model), 0.0).save_pretrained(folder)
    return saved(folder)


def gradients(start: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Of the one step of plain descent at rate 1. No adapter is without one: a step would leave it as it was."""
    end = saved(folder)
    found = {name: value - end[name] for name, value in start.items()}
    assert all(value.count_nonzero() for value in found.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [needs(name) for name in ENGINES])
def test_an_engine_takes_the_step_of_one_process(
    name: str, model: Path, alone: Path, start: dict[str, Tensor], tmp_path: Path
) -> None:
    """Gradient and saved adapter of each case, by one global batch."""
    codes, output = ends(start_engine("engine_worker.py", name, str(model), str(tmp_path)))
    assert codes == [0, 0], output
    for case, _ in cases():
        found, expected = (json.loads((folder / f"{case}.json").read_text()) for folder in (tmp_path, alone))
        assert (found["engine"], found["num_processes"], found["backend"]) == (name, 2, "gloo")
        assert found["share_held"] == pytest.approx(0.5 if name in engine.IN_PARTS else 1.0, abs=0.01)
        rounded = case == "lp-bfloat16"
        assert found["dtypes"] == [[False, f"torch.{'bfloat16' if rounded else 'float32'}"], [True, "torch.float32"]]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3 if rounded else 1e-5)
        ours, theirs = (gradients(start, folder / case) for folder in (tmp_path, alone))
        if not rounded:
            assert_same_figures(found["figures"], expected["figures"])
            assert_same_weights(saved(tmp_path / case), saved(alone / case))
            assert_same_weights(ours, theirs)


@pytest.mark.slow
def test_a_pair_cut_into_two_units_fails(model: Path, tmp_path: Path) -> None:
    """Why ``shard_layers`` exists: the second layer meets the shards of the first."""
    codes, output = ends(start_engine("engine_worker.py", "FSDP2", str(model), str(tmp_path), "layers"))
    assert codes != [0, 0] and "mixed torch.Tensor and DTensor" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", [needs(name) for name in ("FSDP2", "ZeRO-3")])
def test_the_program_under_an_engine_is_that_of_one_process(
    name: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Training, evaluation, generation, tasks, the best checkpoint, the control, and what is saved."""
    options: tuple[str, ...] = ("train.max_steps=2", "train.save_steps=2", "loss.ce=0.25")
    options += ("train.per_device_train_batch_size=1",)
    options += ("train.load_best_model_at_end=true", "evaluate.prompt=A list", "evaluate.max_new_tokens=4")
    options += ("evaluate.tasks=[piqa_local, lambada_local, wikitext_local]", "train.task_steps=2")
    options += (f"evaluate.task_data={write_eval_files(tmp_path / 'files')}", "evaluate.task_batch_size=4")
    program = Program(tmp_path, tiny_tokenizer, *options, "evaluate.tokens=256")
    expected = program.run("one")
    arguments = (str(program.config), *program.options)
    codes, output = ends(start_engine("engine_program.py", name, *arguments, f"train.output_dir={tmp_path / 'two'}"))
    assert codes == [0, 0], output
    assert_same_weights(weights(tmp_path / "two"), weights(expected))
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "two", expected))
    for figures in ("sequential", "paired", "recovered", "control"):
        assert_same_figures(ours[figures], theirs[figures])
    assert ours["cost"] == theirs["cost"] and ours["sample"] == theirs["sample"]
    assert ours["environment"]["engine"] == name and theirs["environment"]["engine"] == "NO"
    for model, figures in theirs["tasks_at_start"].items():
        assert len(figures) == 3 and ours["tasks_at_start"][model] == pytest.approx(figures, rel=1e-4)
    for task in theirs["tasks_at_start"]["paired"]:
        (at_the_end,) = logged(expected, f"eval_{task}")
        assert logged(tmp_path / "two", f"eval_{task}") == [pytest.approx(at_the_end, rel=1e-4)]


@pytest.mark.slow
def test_sharded_checkpoints_go_on(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """FSDP2's are whole files: another number of processes goes on from them, and DDP does not."""
    program = Program(tmp_path, tiny_tokenizer, "train.max_steps=4", "train.eval_steps=4", "train.save_steps=2")
    folder, arguments = tmp_path / "run", (str(program.config), *program.options)
    whole = program.run("whole")
    codes, output = ends(start_engine("engine_program.py", "FSDP2", *arguments, f"train.output_dir={folder}"))
    assert codes == [0, 0], output
    for path in (folder / "checkpoint-4", folder / "report.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    codes, output = ends(program.start("run", "--resume"))
    assert codes == [2] and "written by processes 2 x FSDP2, this run has 1 x NO; launch it as before" in output
    resumed = (*arguments, f"train.output_dir={folder}", "--resume")
    codes, output = ends(start_engine("engine_program.py", "FSDP2", *resumed, processes=1))
    assert codes == [0] and "note: written by 2 processes, this run has 1" in output
    assert_same_weights(weights(folder), weights(whole))
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)


# --- what is refused in one line


class World:
    """Of accelerate's state what the checks read."""

    def __init__(self, kind: str, processes: int) -> None:
        self.distributed_type, self.num_processes = types.SimpleNamespace(value=kind), processes


@pytest.mark.parametrize(
    ("environment", "kind", "told"),
    [
        (ENGINES["FSDP2"], "MULTI_CPU", "engine FSDP2: on CPUs accelerate would go on without it"),
        (ENGINES["ZeRO-2"], "NO", "engine ZeRO-2: on CPUs accelerate would go on without it"),
        ({**ENGINES["FSDP2"], "FSDP_VERSION": "1"}, "MULTI_GPU", "engine FSDP1: not supported"),
        ({**ENGINES["ZeRO-3"], "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "DEEPSPEED", "engine ZeRO-1: not supported"),
        ({**ENGINES["FSDP2"], "FSDP_STATE_DICT_TYPE": ""}, "MULTI_GPU", "fsdp_state_dict_type : any number"),
        ({**ENGINES["FSDP2"], "FSDP_OFFLOAD_PARAMS": "true"}, "MULTI_GPU", "fsdp_offload_params true: the loss needs"),
    ],
)
def test_an_engine_that_would_not_run_is_refused(
    environment: dict[str, str], kind: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**environment, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        check_engine(World(kind, 2))


def test_another_engine_than_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    assert engine.look(model, 6, 6) == {"engine": "NO", "num_processes": 1, "backend": None, "share_held": 1.0}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="num_processes 2: asked for, but 1 runs"):
        engine.look(model, 6, 6)
    for name, value in ENGINES["FSDP2"].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="engine FSDP2: asked for, but NO runs"):
        engine.look(model, 6, 6)
    monkeypatch.setattr(engine, "seen", lambda prepared: "FSDP2")
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_backend": "mpi"}.items():
        monkeypatch.setattr(engine.dist, name, lambda value=value: value)
    with pytest.raises(UserError, match="backend gloo: asked for, but mpi runs"):
        engine.look(model, 6, 6)
    monkeypatch.setattr(engine.dist, "get_backend", lambda: "cpu:gloo")
    with pytest.raises(UserError, match="each of 2 processes should hold a part of the weights, this one holds 100%"):
        engine.look(model, 6, 6)
    assert engine.look(model, 3, 6)["share_held"] == 0.5


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE 2: this process sees a world of 1; on CPUs launch with ACC"):
        check_engine(World("NO", 1))


def test_an_adapter_that_is_not_whole_is_told(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = paired_with_adapter(tiny_llama, 0.0)
    live = whole_state(model, trained=True)
    model.save_pretrained(tmp_path, state_dict=live)
    check_adapter(model, tmp_path, live)
    name = next(iter(live))
    for spoilt in (live | {name: live[name] * 1.001}, live | {name: live[name][:1]}, live | {name: live[name][:0]}):
        with pytest.raises(UserError, match="this adapter is not whole"):
            check_adapter(model, tmp_path, spoilt)
    fewer = {n: value for n, value in live.items() if n != name}
    model.save_pretrained(tmp_path, state_dict=fewer)
    with pytest.raises(UserError, match=f"{len(fewer)} tensors saved of {len(live)} that are trained"):
        check_adapter(model, tmp_path, live)


def test_an_engine_loads_the_base_in_its_own_way_after_pairs_were_chosen(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole in host memory for FSDP2, not as the choice had it on its device."""
    where: list[torch.device] = []

    def load(config: Any, device: torch.device) -> nn.Module:
        where.append(device)
        raise InterruptedError

    monkeypatch.setattr(finetune.models, "load_base", load)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    plan, chosen_on = PairPlan.parse("0:2", num_layers=4), nn.Linear(1, 1)
    with pytest.raises(InterruptedError):
        finetune.build_model(configure(), plan, torch.device("cuda"), chosen_on)
    assert where == [torch.device("cpu")]
