"""Pairs chosen one after the other: each time the one, anywhere, that costs least with those that are there.

A candidate shares everything below it with the plan so far; only the layers above run anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lp_train.errors import UserError
from lp_train.pairing import AutoPairs
from lp_train.pairing.plan import blocks_of
from lp_train.selection.calibration import Calibration
from lp_train.selection.stack import Stack

AT_A_TIME = 16  # candidates whose final states exist together


@dataclass(frozen=True)
class Step:
    """The pair (``first``, ``first`` + 1) joined the plan. Of the whole plan then, nats per token: ``gap``, its NLL
    less the original's, and ``kl``. ``candidates``: the KL that each possible pair would have led to, by its
    first layer."""

    first: int
    gap: float
    kl: float
    candidates: dict[int, float]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Step:
        return cls(**{**content, "candidates": {int(k): kl for k, kl in content["candidates"].items()}})


def greedy(calibration: Calibration, wanted: AutoPairs) -> list[Step]:
    """The path to a plan as ``wanted``, read from where an earlier one is kept as far as that goes.

    Raises:
        UserError: more pairs than there is room for, a limit that one pair already breaks, NaN or infinite values.
    """
    count, kept = wanted.count(calibration.num_layers), calibration.kept("greedy") or {"path": []}
    path = [Step.from_dict(step) for step in kept["path"]]
    while (len(path) < count) if count else (not path or path[-1].kl <= wanted.limit):
        if not (candidates := _candidates([step.first for step in path], calibration.num_layers)):
            break
        path.append(_next(calibration, path, candidates))
        calibration.keep("greedy", {"path": [asdict(step) for step in path]})
    if count is None:
        return _within(path, wanted.limit)
    if len(path) < count:
        fits = f"one after the other, the cheapest leave room for {len(path)} of {count} pairs"
        raise UserError(f"plan.pairs: {fits}; ask for {len(path)} or give a window")
    return path[:count]


def _within(path: list[Step], limit: float) -> list[Step]:
    """As far as the path keeps to the limit."""
    length = next((i for i, step in enumerate(path) if step.kl > limit), len(path))
    if not length:
        cheapest = (
            f"the cheapest pair, {path[0].first}-{path[0].first + 1}, costs {path[0].kl:.4f} nats per token already"
        )
        raise UserError(f"plan.pairs 'auto:loss<={limit:g}': {cheapest}; allow more, or give auto:N")
    return path[:length]


def _candidates(chosen: Sequence[int], num_layers: int) -> list[int]:
    taken = {layer for first in chosen for layer in (first, first + 1)}
    return [k for k in range(num_layers - 1) if not taken & {k, k + 1}]


def _next(calibration: Calibration, path: list[Step], candidates: list[int]) -> Step:
    chosen = [step.first for step in path]

    def measure(stack: Stack) -> Iterator[Tensor]:
        yield stack.sums([stack.select(stack.states[-1])])
        states = _states(stack, chosen)
        for i in range(0, len(candidates), AT_A_TIME):
            some = candidates[i : i + AT_A_TIME]
            yield stack.sums([stack.finish([*chosen, k], k, states[k]) for k in some])

    pieces = 1 - (-len(candidates) // AT_A_TIME)
    original, *means = calibration.total(measure, pieces, f"pair {len(path) + 1}") / calibration.tokens
    nlls, kls = torch.stack(means).T.tolist()
    best = kls.index(min(kls))
    return Step(candidates[best], nlls[best] - float(original[0]), kls[best], dict(zip(candidates, kls, strict=True)))


def _states(stack: Stack, chosen: Sequence[int]) -> dict[int, Tensor]:
    """The input of each block of the plan so far, by its first layer; below the first pair they are the original's."""
    start = min(chosen, default=stack.num_layers)
    states = dict(enumerate(stack.states[: start + 1]))
    hidden = stack.states[start]
    for block in blocks_of(chosen, start, stack.num_layers):
        states[block[0]] = hidden
        hidden = stack.run([block], hidden)
    return states
