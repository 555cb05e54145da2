"""Nothing runs, is sent or is written that the user has not asked for."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from launched import ROOT
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import lp_train
from lp_train import finetune, models
from lp_train.config import load_config
from lp_train.errors import UserError

SECRETS = {"HF_TOKEN": "hf_f00dfeedf00dfeed", "WANDB_API_KEY": "f00dfeed" * 5}
COMMIT = re.compile(r"[0-9a-f]{40}")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("security")
    model = tiny_run.save_model(folder / "model", tiny_tokenizer)
    return tiny_run.write_config(folder / "config.yaml", model, tiny_run.write_text(folder / "text.jsonl"))


def with_code_of_its_own(config: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the model that brings Python code, and the file that this code would leave when it is imported."""
    model, left = shutil.copytree(config.parent / "model", folder / "model"), folder / "ran"
    described = json.loads((model / "config.json").read_text())
    described |= {"model_type": "surprise", "auto_map": {"AutoConfig": "surprise.Surprise"}}
    (model / "config.json").write_text(json.dumps(described))
    body = f"import pathlib\nfrom transformers import LlamaConfig\npathlib.Path({str(left)!r}).touch()\n"
    (model / "surprise.py").write_text(f"{body}class Surprise(LlamaConfig):\n    pass\n")
    return model, left


def test_a_models_own_code_runs_only_where_it_is_trusted(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, left = with_code_of_its_own(config, tmp_path)
    command = [str(config), f"model.name_or_path={model}", f"train.output_dir={tmp_path / 'run'}", "--dry-run"]
    assert finetune.main(command) == 2
    assert not left.exists()
    assert "trust_remote_code" in capfd.readouterr().err.splitlines()[-1]
    finetune.main([*command, "model.trust_remote_code=true"])
    assert left.exists()


def test_an_adapter_of_pickles_is_refused(config: Path, tmp_path: Path) -> None:
    assert finetune.main([str(config), f"train.output_dir={tmp_path / 'run'}", "train.max_steps=1"]) == 0
    adapter = tmp_path / "run" / "adapter"
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only pickle files in it, which can run code"):
        lp_train.load(str(adapter))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_comes_from_the_hub_is_pinned(path: Path) -> None:
    config = load_config(path)
    sources = [config.model, *(s for s in (*config.data.train, *(config.data.eval or ())))]
    from_hub = [s for s in sources if hub_id(getattr(s, "name_or_path", None) or s.path)]
    assert all(COMMIT.fullmatch(s.revision or "") for s in from_hub)
    assert bool(from_hub) == (not path.stem.startswith(("demo", "smollm2")))


def hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None


def test_another_model_is_not_asked_for_the_revision_of_the_files(tmp_path: Path) -> None:
    file, other = ROOT / "configs" / "llama8b.yaml", "model.name_or_path=nobody/other"
    assert load_config(file, [other]).model.revision is None
    assert load_config(file, ["model.revision=main", other]).model.revision == "main"


def test_the_record_has_the_commit_that_the_hub_gave(config: Path) -> None:
    loaded = load_config(config)
    model = models.load_base(loaded.model)
    model.config.layer_parallel, model.config._commit_hash = {}, "c0ffee"
    assert models.stamp(model, loaded.model)["base"]["revision"] == "c0ffee"


WATCH = """
import os, socket

def refuse(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        with open(os.environ["WATCHED"], "a") as file:
            print(address, file=file)
        raise OSError("no network here")
    return original(self, address, *rest)

original, socket.socket.connect = socket.socket.connect, refuse
"""


@pytest.mark.slow
def test_a_run_on_local_files_calls_nobody_and_tells_no_secret(config: Path, tmp_path: Path) -> None:
    """Without HF_HUB_OFFLINE: what libraries report to their makers would be seen, and whatever else connects."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_", "WANDB"))}
    environment |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "WATCHED": str(tmp_path / "calls"), **SECRETS}
    command = [sys.executable, str(ROOT / "lp_train" / "finetune.py"), str(config), "track.wandb=off"]
    run = tmp_path / "run"
    done = subprocess.run(
        [*command, f"train.output_dir={run}"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "calls").exists(), (tmp_path / "calls").read_text()
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert len(written) > 10
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        assert not [content for content in written if secret.encode() in content]
