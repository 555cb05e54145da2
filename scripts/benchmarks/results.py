"""A file of results, one JSON line for each finished variant: written while the benchmark runs, read again later."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lp_train
from benchmarks.case import Case, model_config
from lp_train.distill import flash4
from lp_train.errors import UserError
from lp_train.pairing.families import head_dim

SAME = ("case", "versions", "device", "machine", "commit", "code")  # only lines that agree in these are compared


def identity(device: torch.device) -> dict[str, str]:
    """What device name and commit do not tell apart: this GPU (or host), as a hash, and the code that runs."""
    gpu = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    code = hashlib.sha256()
    for folder in (Path(lp_train.__file__).parent, Path(__file__).parent, Path(__file__).parents[1] / "run_evaluation"):
        for path in sorted(path for kind in ("*.py", "*.yaml") for path in folder.rglob(kind)):
            code.update(path.read_bytes())
    machine = hashlib.sha256(str(gpu or platform.node()).encode())
    return {"machine": machine.hexdigest()[:8], "code": code.hexdigest()[:8]}


def appender(path: Path) -> Callable[[dict[str, Any]], None]:
    """A function that appends a line. Raises UserError at once where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); name a file such as x.jsonl") from None

    def append(line: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    return append


def read(path: Path) -> list[dict[str, Any]]:
    """One result for each case, machine and code; of a variant measured twice the later line counts."""
    merged: dict[str, dict[str, Any]] = {}
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the file that train --out wrote") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
            key, variants = json.dumps([found[name] for name in SAME]), found["variants"]
        except (ValueError, KeyError, TypeError):
            rule = f"a JSON object with variants, {', '.join(SAME)}"
            raise UserError(f"{path}, line {number}: not {rule}; give the file that train --out wrote") from None
        merged[key] = {**found, "variants": {**merged.get(key, {}).get("variants", {}), **variants}}
    for found in merged.values():
        compare(found["variants"])
    return list(merged.values())


def beyond_the_plain_step(found: dict[str, Any]) -> list[str]:
    """What a training case asked for, and FlashAttention 4 where ours took it on a Hopper GPU: names for a table."""
    case, installed = found["case"], found["versions"].get("flash-attn-4")
    taken = installed and head_dim(model_config(Case(case["shape"]))) == flash4.HEAD_DIM
    names = {"checkpointing": case["gradient_checkpointing"], "FP8": case["fp8"], "FlashAttention 4": taken}
    return [name for name, is_so in names.items() if is_so]


def compare(variants: dict[str, dict[str, Any]]) -> None:
    """Sets ``ours_is``: how many times as fast ours is; None where either was not measured."""
    ours = variants.get("ours", {}).get("tokens_per_second")
    for row in variants.values():
        row["ours_is"] = ours / row["tokens_per_second"] if ours and "error" not in row else None
