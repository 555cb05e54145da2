"""What sharing states is worth: windows evaluated from scratch, on the same tokens and machine as the sweep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lp_train.evaluation.fidelity import as_it_is, evaluating, measure
from lp_train.pairing import pair_layers, unpair_layers
from lp_train.pairing.families import decoder_of
from lp_train.selection.calibration import Calibration
from lp_train.selection.stack import Stack
from pair_analysis.sweep import all_windows, windows

CPU_SAMPLE = 9  # windows from scratch, evenly spaced over the grid; on a GPU all of them
Result = TypeVar("Result")


def compare(calibration: Calibration, sample: int | None = None) -> dict[str, Any]:
    """Seconds of the sweep of the first batch, and of its windows one by one: same process, each after a warm-up.

    ``whole_forward``: the paired model's whole forward, then the head for it and for the original, whose states are
    given. ``evaluation``: ``lp_train.evaluation.fidelity.measure``, which runs the original for every window. Both are
    the mean over ``sample`` windows (None: all) times the number of windows.
    ``largest_difference``: between the sweep's and the evaluation's NLL and KL of the sampled windows.
    """
    model, indices, grid = (
        calibration.model,
        range(min(calibration.batch_size, len(calibration.rows))),
        windows(calibration.num_layers),
    )
    chosen = grid[:: max(1, len(grid) // sample)] if sample else grid
    batch = calibration.batch(indices)

    def from_shared_states() -> Tensor:
        return torch.cat(list(all_windows(Stack(model, batch, calibration.algebra))))

    with evaluating(model):
        stack = Stack(model, batch, calibration.algebra)
        stack.sums([stack.finish((), 0, stack.states[0])])  # the warm-up
        sums, shared = _timed(from_shared_states)
        found = [_one_by_one(calibration, stack, batch, indices, window) for window in chosen]
    whole, evaluation = (sum(row[i] for row in found) * len(grid) / len(found) for i in (0, 1))
    ours = torch.stack([sums[1 + grid.index(window)] for window in chosen]).cpu() / len(stack.labels)
    theirs = torch.tensor([row[2:] for row in found], dtype=torch.float64)
    return {
        "windows": len(grid),
        "sampled": len(chosen),
        "tokens": len(stack.labels),
        "sweep_seconds": shared,
        "whole_forward_seconds": whole,
        "evaluation_seconds": evaluation,
        "whole_forward_ratio": whole / shared,
        "evaluation_ratio": evaluation / shared,
        "largest_difference": (ours - theirs).abs().max().item(),
    }


def _one_by_one(
    calibration: Calibration, stack: Stack, batch: dict[str, Tensor], indices: Iterable[int], window: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Seconds of a whole forward and of an evaluation of one window, and the NLL and KL that the latter finds."""
    model, (start, pairs) = calibration.model, window
    pair_layers(model, f"{start}:{start + 2 * pairs}", calibration.algebra)
    rows = [calibration.rows[i] for i in indices]
    _, whole = _timed(lambda: stack.sums([_final(model, batch)]))
    found, evaluation = _timed(lambda: measure(model, rows, calibration.collate, len(rows), {"paired": as_it_is}))
    unpair_layers(model)
    return whole, evaluation, found["paired"].nll, found["paired"].kl


def _final(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    return decoder_of(model)(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch["trained"]]


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    _wait()
    started = time.perf_counter()
    result = work()
    _wait()
    return result, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
