"""Exported checkpoints in a process without lp_train, and under the family's own class. Tolerance 1e-5."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from closeness import error
from family_cases import CASES, PAIRS

import export
from lp_train.pairing import pair_layers

IDS = torch.arange(5, 45)[None]
FORMS = {"fused": ("llama", "fused"), "paired": ("llama", "paired"), "mixed": ("qwen2", "fused")}
ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for trust in (None, False, True):  # code that was trusted once is known from then on
    for form in sys.argv[2:]:
        folder = f"{sys.argv[1]}/{form}"
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        except Exception as error:
            found[f"{form} {trust}"] = str(error)
            continue
        found[f"{form} {trust}"] = type(model).__name__
        torch.save(model(torch.arange(5, 45)[None]).logits, f"{folder}.pt")
        model.save_pretrained(f"{folder} again")
assert not any(name.startswith("lp_train") for name in sys.modules)
json.dump(found, open("found.json", "w"))  # on standard output Transformers asks whether it may trust
"""


def model_of(form: str) -> Any:
    return pair_layers(CASES[FORMS[form][0]].model(), PAIRS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("alone")
    for form, (_, written_as) in FORMS.items():
        (made / form).mkdir()
        export._write_layers(model_of(form), made / form, written_as, export.SHARD, print)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, str]:
    """By form and trust: the class that one process without lp_train loaded, or why it did not."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(folder / "modules")}
    arguments = [sys.executable, "-c", ALONE, str(folder), *FORMS]
    done = subprocess.run(
        arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_loads_through_its_own_file_without_lp_train(form: str, folder: Path, alone: dict[str, str]) -> None:
    model = model_of(form)
    assert alone[f"{form} True"] == f"LayerParallel{type(model).__name__}"
    expected = model(IDS).logits
    saved = hf.AutoModelForCausalLM.from_pretrained(folder / f"{form} again")
    for logits in (torch.load(folder / f"{form}.pt"), saved(IDS).logits):
        assert error(logits, expected) < 1e-5


@pytest.mark.parametrize("trust", ["None", "False"])
@pytest.mark.parametrize("form", FORMS)
def test_without_lp_train_and_without_trust_it_does_not_load(form: str, trust: str, alone: dict[str, str]) -> None:
    assert "trust_remote_code" in alone[f"{form} {trust}"]


@pytest.mark.parametrize("form", ["fused", "mixed"])
def test_the_family_s_own_class_refuses_the_checkpoint(form: str, folder: Path) -> None:
    own = type(CASES[FORMS[form][0]].model())
    with pytest.raises(Exception, match="is a per-layer attribute"):
        own.from_pretrained(folder / form)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_family_s_own_class_refuses_pairs(name: str, tmp_path: Path) -> None:
    """It would run them in order. Ours gives their logits, also saved once more."""
    model = pair_layers(CASES[name].model(), PAIRS)
    export._write_layers(model, tmp_path, "paired", export.SHARD, print)
    same = {"attn_implementation": model.config._attn_implementation}  # 5.18 gives Gemma 2 one without caps
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **same)
    again.save_pretrained(tmp_path)
    assert error(hf.AutoModelForCausalLM.from_pretrained(tmp_path, **same)(IDS).logits, model(IDS).logits) < 1e-5
    with pytest.raises(Exception, match="is a per-layer attribute"):
        type(CASES[name].model()).from_pretrained(tmp_path)
