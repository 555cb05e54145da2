"""The doctor on healthy and on sick nodes, with one process and with two."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
from launched import ROOT, ends, start
from transformers import PreTrainedTokenizerFast

from lp_train.cluster import doctor

NAMES = ("versions", "processes", "gpus", "shared folder", "disk", "hub", "wandb", "memory")
SECRETS = {"WANDB_API_KEY": "f00dfeed" * 5, "HF_TOKEN": "hf_f00dfeedf00dfeed"}


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    model = tiny_run.save_model(tmp_path / "model", tiny_tokenizer)
    return str(tiny_run.write_config(tmp_path / "tiny.yaml", model, tiny_run.write_text(tmp_path / "text.jsonl")))


def lines(output: str) -> dict[str, str]:
    """The level and text of each check by its name."""
    found = {}
    for line in output.splitlines():
        level, _, rest = line.partition(" ")
        if level in doctor.LEVELS:
            name, _, text = rest.strip().partition(": ")
            found[name] = f"{level} {text}"
    return found


def test_a_healthy_node(config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    before = sorted(Path(config).parent.rglob("*"))
    assert doctor.main([config]) == 0
    captured = capsys.readouterr()
    found = lines(captured.out)
    assert tuple(found) == NAMES and not [text for text in found.values() if text.startswith("FAILED")]
    assert found["hub"].startswith("ok configuration and tokenizer of /")
    assert not [secret for secret in SECRETS.values() if secret in captured.out + captured.err]
    assert sorted(Path(config).parent.rglob("*")) == before
    assert doctor.main([]) == 0


def test_a_configuration_that_is_wrong(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([config, "lora.r=0"]) == 2
    assert capsys.readouterr().err == "error: lora.r 0: a rank is at least 1, for example 16\n"


@pytest.mark.parametrize(
    ("overrides", "failed"),
    [
        (["model.name_or_path=meta-llama/Llama-3.1-405B"], {"hub": "cannot be loaded", "memory": "grad"}),
        (["train.per_device_train_batch_size=3"], {"memory": "does not divide the 4 rows"}),
        (["train.save_total_limit=100000000000"], {"disk": "make room or lower train.save_total_limit"}),
        (["track.wandb=online"], {"wandb": "runs stay offline: no key for api.wandb.ai; run `wandb login`"}),
    ],
)
def test_what_a_run_would_meet(
    overrides: list[str],
    failed: dict[str, str],
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    assert doctor.main([config, *overrides]) == 1
    found = {n: t for n, t in lines(capsys.readouterr().out).items() if t.startswith("FAILED")}
    assert found.keys() == failed.keys()
    assert all(failed[name] in text for name, text in found.items()), found


def test_what_is_wrong_with_the_machine(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LP_WORLD_SIZE", "2")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    monkeypatch.setattr(doctor, "requires", lambda package: ["torch>=99", "numpy>=1", "wandb>=99; extra == 'wandb'"])
    assert doctor.main([config]) == 1
    found = {n: t for n, t in lines(capsys.readouterr().out).items() if t.startswith("FAILED")}
    assert found.keys() == {"processes", "disk", "versions"}
    assert "LP_WORLD_SIZE 2: the job has as many processes, this one sees a world of 1" in found["processes"]
    assert "needed >=99" in found["versions"] and "numpy" not in found["versions"]


ON_ITS_OWN_DISK = """
import os, sys; os.chdir(sys.argv.pop(1) + os.environ["RANK"])
from lp_train.cluster import doctor; sys.exit(doctor.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_that_share_no_folder(config: str, tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / f"node{rank}").mkdir()
    (tmp_path / "doctor.py").write_text(ON_ITS_OWN_DISK)
    command = [str(tmp_path / "doctor.py"), str(tmp_path / "node"), config, "train.output_dir=."]
    codes, output = ends(start(command, 2, PYTHONPATH=str(ROOT)))
    assert codes == [1, 1], output
    found = lines(output)
    assert {n for n, text in found.items() if text.startswith("FAILED")} == {"shared folder"}
    assert f"{tmp_path}/node1: not the folder of process 0; name one on a shared disk" in found["shared folder"]
    assert "(process 1 on " in found["shared folder"]
    assert found["processes"].startswith("ok 2 on 1 host(s), all-reduce of 64 MiB by gloo in ")
