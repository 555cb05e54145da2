"""What the tests of lp_train.bench share: a configuration, and models without memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import COMMON, Case
from torch import nn
from transformers import AutoModelForCausalLM

from lp_train.config import Config, load_config

SHAPES = Path(__file__).resolve().parent.parent / "configs" / "shapes"

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """``configure("lora.scope=suffix", ...)``: pairs (0, 1) and (3, 4), LoRA of rank 4, and the given overrides."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "{model: {name_or_path: m}, plan: {pairs: [[0, 1], [3, 4]]}, data: {train: x.txt}, train: {max_steps: 1}}"
    )
    return lambda *overrides: load_config(file, ["lora.r=4", *overrides])


def on_meta(case: Case, **options: Any) -> tuple[Any, nn.Module]:
    hf_config = case.config(**{**COMMON, **case.options, **options})
    with torch.device("meta"):
        return hf_config, AutoModelForCausalLM.from_config(hf_config, attn_implementation=case.attention)
