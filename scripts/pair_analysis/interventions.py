"""What a window of layers is for: it is run in another way, at every position and length, and the NLL is measured.

    reverse   the layers in reverse order
    drop      without them
    merge     one layer with the mean of their weights, called as the window's first
    parallel  all of them on the window's input x, their updates added: x + sum of (L_i(x) - x)
    pairs     in pairs side by side (windows of even length)

As in arXiv 2502.02790, where the order is random instead of reversed. Windows begin with the original's state below
them and share what they can with the shorter ones of the same start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from lp_train.errors import UserError
from lp_train.pairing.families import decoder_of
from lp_train.selection.calibration import Calibration
from lp_train.selection.stack import Stack

Grown = Iterator[Tensor | None]  # the state after windows of one start of 1, 2, 3... layers; None: not defined


def interventions(calibration: Calibration) -> dict[str, dict[tuple[int, int], float]]:
    """Of each kind, the NLL less the original's, nats per token, by (start, layers) of the window.

    Raises:
        UserError: layers whose weights have no mean (of unequal shape, or quantised).
    """
    check_alike(calibration.model)
    layers = calibration.num_layers
    sums = calibration.total(_all_kinds, 1 + layers * len(KINDS), "interventions") / calibration.tokens
    original, *nlls = sums[:, 0].tolist()
    places = [(kind, start, n) for start in range(layers) for kind in KINDS for n in lengths(kind, layers - start)]
    found: dict[str, dict[tuple[int, int], float]] = {kind: {} for kind in KINDS}
    for (kind, start, n), nll in zip(places, nlls, strict=True):
        found[kind][start, n] = nll - original
    return found


def lengths(kind: str, most: int) -> range:
    """The numbers of layers that windows of this kind have. One layer is only worth dropping."""
    return range(1 if kind == "drop" else 2, most + 1, 2 if kind == "pairs" else 1)


def check_alike(model: nn.Module) -> None:
    """Refuses a model whose layers have no mean."""
    weights = [dict(layer.named_parameters()) for layer in decoder_of(model).layers]
    shapes = [{name: (p.shape, p.is_floating_point()) for name, p in of_layer.items()} for of_layer in weights]
    if any(shape != shapes[0] for shape in shapes) or not all(whole for _, whole in shapes[0].values()):
        raise UserError("interventions: merging needs layers of equal shape, not quantised; this model has others")


def _all_kinds(stack: Stack) -> Iterator[Tensor]:
    yield stack.sums([stack.select(stack.states[-1])])
    for start in range(stack.num_layers):
        for kind, grow in KINDS.items():
            wanted = lengths(kind, stack.num_layers - start)
            states = [(n, state) for n, state in enumerate(grow(stack, start), start=1) if n in wanted]
            yield stack.sums([stack.finish((), start + n, state) for n, state in states if state is not None])


def _reverse(stack: Stack, start: int) -> Grown:
    for end in range(start + 1, stack.num_layers + 1):
        yield stack.run([(i,) for i in reversed(range(start, end))], stack.states[start])


def _drop(stack: Stack, start: int) -> Grown:
    for _ in range(start, stack.num_layers):
        yield stack.states[start]


def _merge(stack: Stack, start: int) -> Grown:
    """A running mean in float32: each longer window adds one layer to it."""
    first, kwargs = stack.calls[start]
    merged: nn.Module = copy.deepcopy(first)
    mean = [p.detach().float() for p in first.parameters()]
    for n, (layer, _) in enumerate(stack.calls[start:], start=1):
        mean = [m + (p.detach().float() - m) / n for m, p in zip(mean, layer.parameters(), strict=True)]
        for target, value in zip(merged.parameters(), mean, strict=True):
            target.data.copy_(value)
        yield merged(stack.states[start], **kwargs)


def _parallel(stack: Stack, start: int) -> Grown:
    x = stack.states[start]
    hidden = x
    for i in range(start, stack.num_layers):
        hidden = hidden + (stack.layer(i, x) - x)
        yield hidden


def _pairs(stack: Stack, start: int) -> Grown:
    hidden = stack.states[start]
    for i in range(start, stack.num_layers - 1, 2):
        yield None
        hidden = stack.pair(i, hidden)
        yield hidden


KINDS: dict[str, Callable[[Stack, int], Grown]] = {
    "reverse": _reverse,
    "drop": _drop,
    "merge": _merge,
    "parallel": _parallel,
    "pairs": _pairs,
}
