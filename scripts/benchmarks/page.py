"""The tables of a page, written from the files of results that the page names.

    PYTHONPATH=.:scripts python -m benchmarks.page recipes/benchmarks/README.md

A table stands between the lines ``<!-- table: KIND FILE [FILE ...] -->`` and ``<!-- end -->``. KIND is one of KINDS;
files are given as seen from the page, and a * in their names stands for anything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import infer_table, predict, results, scaling
from benchmarks import table as tables
from benchmarks.table import cell, markdown
from lp_train.errors import UserError, exit_code

TABLE = re.compile(r"(<!-- table: (\w+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

Found = dict[str, Any]
SPENT = ("all-reduces", "other kernels", "gaps")  # what a step consists of


def written(page: Path) -> str:
    """The text of the page with every table made anew.

    Raises:
        UserError, OSError: a file that is not there or holds something else.
    """

    def anew(match: re.Match[str]) -> str:
        start, kind, names, end = match.groups()
        if kind not in KINDS:
            raise UserError(f"{page}, table {kind!r}: no such kind; use one of {', '.join(KINDS)}")
        files = [file for name in names.split() for file in sorted(page.parent.glob(name)) or [page.parent / name]]
        return f"{start}{KINDS[kind](files)}\n{end}"

    return TABLE.sub(anew, page.read_text())


def training(files: Sequence[Path]) -> str:
    """A row for each case: ours and, in the same process, the baselines; how many times as fast ours is."""
    found = [case for file in files for case in results.read(file)]
    header = ("shape, pairs, batch", "ours, tokens/s", "ms", "peak GiB", "of the product rate", "(a)", "(b)", "(c)")
    rows = []
    for case in found:
        variants, how = case["variants"], case["case"]
        size = f"{case['batch']} x {case['seq']:,}"
        named = [f"{how['shape']}, {len(case['pairs'])} from {case['pairs'][0][0]}, {size}"]
        named += results.beyond_the_plain_step(case)
        ours = variants["ours"]
        of_ours = ["out of memory", "", "", ""]
        if "error" not in ours:
            of_ours = [f"{ours['tokens_per_second']:,.0f}", f"{ours['ms_per_step']:,.0f}", f"{ours['peak_gib']:.1f}"]
            of_ours.append(cell(ours["of_matmul"], "{:.1%}"))
        rows.append([", ".join(named), *of_ours, *(_baseline(variants.get(name)) for name in "abc")])
    return f"{_origin(found)}\n\n{markdown(header, rows)}"


def _baseline(row: Found | None) -> str:
    if row is None:
        return "not run"
    return row.get("error") or f"{row['tokens_per_second']:,.0f} ({cell(row['ours_is'], '{:.2f} x')})"


def inference(files: Sequence[Path]) -> str:
    """A row for each plan, mode and batch: milliseconds in order and fused, of each length of the cache."""
    found = infer_table.read(list(files))
    header = ("shape, pairs", "what", "mode", "batch", "cached", "in order, ms", "fused, ms", "speed-up", "of copy")
    rows = [row for run in found for row in _rows_of(run)]
    return f"{_origin(found)}\n\n{markdown(header, rows, left=(0, 1, 2))}"


def _rows_of(run: Found) -> Iterable[list[str]]:
    cells = [c for c in run["cells"] if "ms" in c]
    alone = {tuple(c[name] for name in infer_table.KEY): c for c in cells if c["form"] == "sequential"}
    groups: dict[tuple[Any, ...], list[tuple[Found, Found]]] = {}
    for fused in cells:
        key = tuple(fused[name] for name in infer_table.KEY)
        if fused["form"] == "fused" and key in alone:
            groups.setdefault((fused["pairs"], *key[:3]), []).append((alone[key], fused))
    kinds = list(dict.fromkeys(key[:3] for key in groups))
    for key in sorted(groups, key=lambda key: (kinds.index(key[:3]), key[3])):
        (_, mode, what, batch), both = key, groups[key]
        name = f"{_shape(run)}, {both[0][0]['layers'] - both[0][1]['layers']}"
        of_copy = [c["of_copy"] for _, c in both]
        what = f"{what} {both[0][1]['tokens'] // batch:,}" if what == "generate" else what
        yield [
            *(name, what, infer_table.SPOKEN[mode], str(batch)),
            " / ".join(f"{c['context']:,}" for _, c in both),
            *(" / ".join(f"{c['ms']:,.2f}" for c in column) for column in zip(*both, strict=True)),
            _together([c["speedup"] for _, c in both]),
            "" if None in of_copy else " / ".join(f"{share:.0%}" for share in of_copy),
        ]


def _shape(run: Found) -> str:
    return run["case"]["shape"] or Path(run["case"]["model"]).name


def _together(ratios: Sequence[float | None]) -> str:
    shown = " / ".join(cell(ratio, "{:.2f}") for ratio in ratios)
    return shown if None in ratios else f"{shown} x"


def split(files: Sequence[Path]) -> str:
    """Where the ms of a profiled step go, at the smallest batch and cache, and which share of what is gained where.

    Gaps: the step's median less its kernels. Of several rounds the first is the profiled one.

    Raises:
        UserError: no step in order was profiled.
    """
    found = infer_table.read(list(files))
    header = ["shape, pairs", "step, ms", "all-reduces", *(f"{part}, ms" for part in SPENT)]
    header += ["gained, ms", *(f"by {part}" for part in SPENT)]
    return f"{_origin(found)}\n\n{markdown(header, [row for run in found for row in _split_of(run)])}"


def _split_of(run: Found) -> list[list[str]]:
    profiled = [c for c in run["cells"] if "all_reduce_ms" in c and c["form"] != "paired"]
    in_order = [c for c in profiled if c["form"] == "sequential"]
    if not in_order:
        raise UserError(
            f"{_shape(run)}: no step in order was profiled; measure with --profile --forms sequential,fused"
        )
    alone = min(in_order, key=lambda c: (c["batch"], c["context"]))
    same = (c for c in profiled if all(c[name] == alone[name] for name in infer_table.KEY))
    return [_split_row(_shape(run), alone, step) for step in same]


def _split_row(shape: str, alone: Found, step: Found) -> list[str]:
    before, spent, gained = _spent(alone), _spent(step), alone["ms"] - step["ms"]
    name = f"{shape}, {alone['layers'] - step['layers'] or 'in order'}"
    shares = [f"{(before[part] - spent[part]) / gained:.0%}" if gained > 0 else "" for part in SPENT]
    gain = "" if step is alone else f"{gained:.2f}"
    return [
        name,
        f"{step['ms']:.2f}",
        str(step["all_reduces"]),
        *(f"{spent[part]:.2f}" for part in SPENT),
        gain,
        *shares,
    ]


def _spent(step: Found) -> dict[str, float]:
    reduces, kernels = step["all_reduce_ms"], step["other_kernels_ms"]
    return dict(zip(SPENT, (reduces, kernels, step["ms"] - reduces - kernels), strict=True))


def _origin(found: Sequence[Found]) -> str:
    """Machines, versions, dates and commits of what a table shows."""
    devices = {f"{f.get('world', 1)} x {f['device']}" if f.get("world", 1) > 1 else f["device"] for f in found}
    versions = {f"{name} {f['versions'][name]}" for f in found for name in ("torch", "transformers")}
    dates, commits = {f["date"] for f in found}, {_short(f["commit"]) for f in found}
    parts = [", ".join(sorted(names)) for names in (devices, versions, dates, commits)]
    return f"{'; '.join(parts[:3])}; code of {parts[3]}"


def _short(commit: str | None) -> str:
    name, _, changes = (commit or "unknown").partition("+")
    return f"{name[:7]}+{changes}" if changes else name[:7]


def _lines(files: Sequence[Path]) -> list[Found]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def sweep(files: Sequence[Path]) -> str:
    lines = _lines(files)
    return f"{_origin(lines)}\n\n{tables.sweep(lines)}"


def harness(files: Sequence[Path]) -> str:
    return "\n\n".join(tables.harness(json.loads(file.read_text())) for file in files)


def many(files: Sequence[Path]) -> str:
    """Training on several GPUs."""
    lines = _lines(files)
    return f"{_origin(lines)}\n\n{scaling.steps_table(lines)[0]}"


def prediction(files: Sequence[Path]) -> str:
    """Of the one run of the files."""
    runs = infer_table.read(list(files))
    if len(runs) != 1:
        raise UserError(f"{', '.join(map(str, files))}: {len(runs)} runs, and a prediction is of one; name its file")
    return predict.summary(predict.predict(runs[0]["cells"]))


KINDS: dict[str, Callable[[Sequence[Path]], str]] = {
    function.__name__: function for function in (training, inference, split, sweep, harness, many, prediction)
}


def command(options: argparse.Namespace) -> None:
    for path in options.pages:
        path.write_text(written(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="a Markdown file")
    chosen = parser.parse_args()
    sys.exit(exit_code(lambda: command(chosen)))
