"""What was measured is kept by what it was measured on: base, calibration text, algebra, precision and versions."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

import lp_train
from lp_train.errors import UserError
from lp_train.evaluation.report import write as write_whole
from lp_train.models import cache_folder, fingerprint
from lp_train.pairing.families import decoder_of


def weights_hash(model: nn.Module) -> str:
    """A short hash of the base: :func:`fingerprint` and up to 64 values of every weight of its layers. A fine-tuned
    model often keeps the embedding that the fingerprint alone is of."""
    found = hashlib.sha256(fingerprint(model).encode())
    for parameter in decoder_of(model).layers.parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)][:64].contiguous().cpu()
        found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def about(model: nn.Module, rows: Dataset, algebra: str) -> dict[str, Any]:
    """What figures depend on. ``data``: a hash of the calibration rows' tokens, labels and document lengths."""
    columns = [rows[name][:] for name in ("input_ids", "labels", "seq_lengths")]
    return {
        "model": weights_hash(model),
        "data": hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16],
        "algebra": algebra,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "versions": {"lp_train": lp_train.__version__} | {name: version(name) for name in ("torch", "transformers")},
    }


def folder_of(made_for: dict[str, Any]) -> Path:
    """Where the figures for these facts are kept: a folder of ``lp_train.models.cache_folder()``."""
    key = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "selection" / key


def write(file: Path, made_for: dict[str, Any], content: dict[str, Any]) -> None:
    """``content`` with what it was made for, as JSON, whole or not at all."""
    write_whole(file, json.dumps({"about": made_for, **content}, indent=1) + "\n")


def read(file: Path, made_for: dict[str, Any]) -> dict[str, Any] | None:
    """What :func:`write` wrote; None if there is nothing, or it was made for other text or versions.

    Raises:
        UserError: not written by :func:`write`, or made for another model.
    """
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        found = content["about"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not a file of figures; delete it, and they are made again") from None
    if found.get("model") != made_for["model"]:
        differs = f"made for another model ({found.get('model')}, this is {made_for['model']})"
        raise UserError(f"{file}: {differs}; delete it, or name another folder")
    return content if found == made_for else None
