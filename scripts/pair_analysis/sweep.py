"""What pairing costs at every position and length: all windows of contiguous pairs, untuned.

Of each batch the original runs once. A window starts from the original's state below it; the windows of one start share
their pairs, each going on where the one before ended. Only the layers above a window run anew for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lp_train.selection.calibration import Calibration
from lp_train.selection.stack import Stack


@dataclass(frozen=True)
class Cost:
    """Of one plan on calibration text: nats per token, KL being KL(original || paired)."""

    nll: float
    kl: float


@dataclass(frozen=True)
class Sweep:
    """``costs[start, pairs]`` of the window that begins with layer ``start``."""

    num_layers: int
    tokens: int
    original_nll: float
    costs: dict[tuple[int, int], Cost]

    def best(self) -> dict[int, int]:
        """The start of the window with the lowest KL, for each number of pairs."""
        counts = sorted({pairs for _, pairs in self.costs})
        return {n: min((s for s, m in self.costs if m == n), key=lambda s: self.costs[s, n].kl) for n in counts}

    def as_dict(self) -> dict[str, Any]:
        windows = [{"start": s, "pairs": n, "nll": c.nll, "kl": c.kl} for (s, n), c in self.costs.items()]
        head = {"num_layers": self.num_layers, "tokens": self.tokens, "original_nll": self.original_nll}
        return {**head, "windows": windows}


def windows(num_layers: int) -> list[tuple[int, int]]:
    """(start, pairs) of every window, in the order in which they are measured."""
    return [(start, n) for start in range(num_layers - 1) for n in range(1, (num_layers - start) // 2 + 1)]


def sweep(calibration: Calibration) -> Sweep:
    """Measures all windows, or reads what an earlier sweep of the same found; a stopped one goes on.

    Raises:
        UserError: NaN or infinite values; kept figures of another model.
    """
    layers = calibration.num_layers
    sums = calibration.total(all_windows, layers, "sweep") / calibration.tokens
    costs = [Cost(nll, kl) for nll, kl in sums.tolist()]
    return Sweep(layers, calibration.tokens, costs[0].nll, dict(zip(windows(layers), costs[1:], strict=True)))


def all_windows(stack: Stack) -> Iterator[Tensor]:
    """NLL and KL of the original, then of the windows of each start: [windows, 2] each."""
    yield stack.sums([stack.select(stack.states[-1])])
    for start in range(stack.num_layers - 1):
        finals, hidden = [], stack.states[start]
        for end in range(start + 2, stack.num_layers + 1, 2):
            hidden = stack.pair(end - 2, hidden)
            finals.append(stack.finish((), end, hidden))
        yield stack.sums(finals)
