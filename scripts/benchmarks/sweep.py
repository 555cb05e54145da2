"""Time per token over sequence length, vocabulary and depth of the first pair, ours against a baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import table, training
from benchmarks.case import Case, model_config, window
from lp_train.errors import UserError

PAIRS = 5  # at each depth, where they fit


@dataclass(frozen=True)
class Axes:
    """Values of each panel. Batches along ``seq`` hold ``tokens`` tokens; the other two keep the case's own batch."""

    seq: Sequence[int] = (1024, 2048, 4096, 8192, 16384)
    vocab: Sequence[int] = (32768, 65536, 131072, 262144)
    depth: Sequence[float] = (0.25, 0.5, 0.75)
    tokens: int = 16384

    def cases(self, base: Case) -> Iterator[tuple[str, float, Case]]:
        """(axis, value, case) of every cell."""
        for seq in self.seq:
            yield "seq", seq, replace(base, batch=max(1, self.tokens // seq), seq=seq)
        for vocab in self.vocab:
            yield "vocab", vocab, replace(base, vocab=vocab)
        layers = model_config(base).num_hidden_layers
        for depth in self.depth:
            yield "depth", depth, replace(base, pairs=window(layers, int(depth * layers), PAIRS))


def run(base: Case, axes: Axes, out: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Measures every cell that ``out/sweep.jsonl`` does not hold yet; ``out/sweep.png`` is drawn anew after each.

    Raises:
        UserError: the file holds a cell of another case.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sweep.jsonl"
    lines: list[dict[str, Any]] = []
    baseline = "c" if base.compile else "b"
    held = {(line["axis"], line["value"]): line for line in map(json.loads, _lines(path))}
    for axis, value, case in axes.cases(base):
        line = held.get((axis, value))
        if line is None:
            say(f"{axis} {value:g}")
            found = training.run(case, ["ours", baseline], say)
            times = {name: time_per_token(row) for name, row in found["variants"].items()}
            line = {"axis": axis, "value": value, "baseline": baseline, "us_per_token": times, **found}
            with path.open("a") as file:
                print(json.dumps(line), file=file)
        elif line["case"] != asdict(case):
            raise UserError(f"--out {out}: holds {axis} {value:g} of another case; name a new folder")
        lines.append(line)
        table.plot_sweep(lines, out / "sweep.png", f"{base.shape}, {line['device']}")
    return lines


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def time_per_token(row: dict[str, Any]) -> float | None:
    """Microseconds, or None where the variant did not run."""
    return None if "error" in row else 1e6 / row["tokens_per_second"]
