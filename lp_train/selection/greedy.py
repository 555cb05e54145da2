"""Pairs chosen one after the other: each time the one, anywhere, that costs least with those that are there.

A candidate shares everything below it with the plan so far; only the layers above run anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_train.errors import UserError
from lp_train.pairing import AutoPairs, blocks_of
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


def greedy(calibration: Calibration, wanted: AutoPairs) -> list[Step]:
    """The path to a plan as ``wanted``; steps that an earlier one took are read, not measured.

    Raises:
        UserError: more pairs than there is room for, a limit that one pair already breaks, NaN or infinite values.
    """
    count, path = wanted.count(calibration.num_layers), list[Step]()
    while count is None or len(path) < count:
        if not (candidates := _candidates([step.first for step in path], calibration.num_layers)):
            break
        step = _next(calibration, [step.first for step in path], candidates)
        if count is None and step.kl > wanted.limit:
            if not path:
                cheapest = f"the cheapest pair, {step.first}-{step.first + 1}, costs {step.kl:.4f} nats per token"
                limit = f"plan.pairs 'auto:loss<={wanted.limit:g}'"
                raise UserError(f"{limit}: {cheapest} already; allow more, or give auto:N")
            break
        path.append(step)
    if count and len(path) < count:
        fits = f"one after the other, the cheapest leave room for {len(path)} of {count} pairs"
        raise UserError(f"plan.pairs: {fits}; ask for {len(path)} or give a window")
    return path


def _candidates(chosen: Sequence[int], num_layers: int) -> list[int]:
    taken = {layer for first in chosen for layer in (first, first + 1)}
    return [k for k in range(num_layers - 1) if not taken & {k, k + 1}]


def _next(calibration: Calibration, chosen: list[int], candidates: list[int]) -> Step:
    def measure(stack: Stack) -> Iterator[Tensor]:
        yield stack.sums([stack.select(stack.states[-1])])
        states = _states(stack, chosen)
        for i in range(0, len(candidates), AT_A_TIME):
            some = candidates[i : i + AT_A_TIME]
            yield stack.sums([stack.finish([*chosen, k], k, states[k]) for k in some])

    pieces = 1 - (-len(candidates) // AT_A_TIME)
    name = "-".join(map(str, ["greedy", *chosen]))
    original, *means = calibration.total(measure, pieces, name) / calibration.tokens
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
