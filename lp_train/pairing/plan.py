"""Which layers of a model are paired."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from lp_train.errors import UserError

AUTO = "auto:"
AUTO_FORMS = "auto:8 (pairs), auto:loss<=0.1 (KL in nats per token) or auto:depth<=0.7 (share of the layers)"
KINDS = ("pair", "drop", "merge", "none")
FORMS = 'a window such as "12:28" (end exclusive) or a list of pairs such as [[4, 5], [8, 9]]'


class _Wrong(Exception):
    """The rule that a plan breaks, and the remedy."""


@dataclass(frozen=True)
class PairPlan:
    """Pairs of consecutive decoder layers, in order, of a model with ``num_layers`` layers.

    Use :meth:`parse`; it validates. ``effective_depth`` is the longest path through the model: layers - pairs.
    ``kind`` other than "pair": a control of the same depth, made by :meth:`control`, in which ``removed`` layers go.
    """

    pairs: tuple[tuple[int, int], ...]
    num_layers: int
    kind: str = "pair"
    removed: tuple[int, ...] = ()

    @classmethod
    def parse(cls, spec: "str | Sequence[Sequence[int]] | PairPlan", num_layers: int) -> "PairPlan":
        """Reads ``"12:28"`` or ``[[4, 5], [8, 9]]`` for a model of ``num_layers`` layers.

        Raises:
            UserError: anything else; a layer out of range, in two pairs, or not followed by its partner; no pair.
        """
        if isinstance(spec, PairPlan):
            spec = spec.pairs
        try:
            pairs = _read_window(spec, num_layers) if isinstance(spec, str) else _read_pairs(spec)
            plan = cls(tuple(sorted(pairs)), num_layers)
            plan._validate()
        except _Wrong as rule:
            raise UserError(f"plan.pairs {spec!r}: {rule}") from None
        return plan

    def control(self, kind: str, remove: Sequence[int] | None = None) -> "PairPlan":
        """The same plan by another ``kind``, to compare pairs with at an equal longest path.

        ``drop``: as many layers as there are pairs go; ``remove`` names them, or the second of each pair does.
        ``merge``: they go into the last layer before them that stays, by the differences of their weights (LaCo, arXiv
        2402.11187): w_k + sum (w_j - w_k). Of two layers that is the second one's weights alone.
        ``none``: all layers in order, the control of training by itself.

        Raises:
            UserError: unknown kind; ``remove`` for pairs or none, not as many layers as pairs, or a wrong one.
        """
        if kind not in KINDS:
            raise UserError(f"plan.kind {kind!r}: unknown; use one of {', '.join(KINDS)}")
        if remove is None:
            seconds = tuple(second for _, second in self.pairs)
            return replace(self, kind=kind, removed=seconds if kind in ("drop", "merge") else ())
        rule = None
        if kind not in ("drop", "merge"):
            rule = f"plan.kind {kind} removes no layer; leave it out, or use drop or merge"
        elif wrong := [i for i in remove if not 0 <= i < self.num_layers]:
            rule = f"layer {wrong[0]} is out of range; the model has layers 0 to {self.num_layers - 1}"
        elif 0 in remove:
            rule = "layer 0 has to stay, since a cache's length is read from it; name another"
        elif len({*remove}) != len(self.pairs) or len(remove) != len(self.pairs):
            rule = f"for the depth of {len(self.pairs)} pairs {len(self.pairs)} different layers go; name as many"
        if rule:
            raise UserError(f"plan.remove {list(remove)}: {rule}")
        return replace(self, kind=kind, removed=tuple(sorted(remove)))

    @property
    def merged(self) -> dict[int, list[int]]:
        """The layers that take others in, and which; empty but for ``kind`` merge."""
        into: dict[int, list[int]] = {}
        for i in self.removed if self.kind == "merge" else ():
            into.setdefault(max(k for k in range(i) if k not in self.removed), []).append(i)
        return into

    def _validate(self) -> None:
        if not self.pairs:
            raise _Wrong(f"no pair in it; give {FORMS}")
        seen: set[int] = set()
        for first, second in self.pairs:
            pair = f"pair {first}-{second}"
            if first < 0 or second >= self.num_layers:
                raise _Wrong(f"{pair} is out of range; the model has layers 0 to {self.num_layers - 1}")
            if second != first + 1:
                rule = f"a pair is a layer and the next one, such as {first}-{first + 1}"
                raise _Wrong(f"{pair} is not consecutive; {rule}")
            if first in seen:
                raise _Wrong(f"layer {first} is in two pairs (overlap); give each layer one partner")
            seen |= {first, second}

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """The layers from the first pair on, in order: two for a pair, else one. In a control all run one by one."""
        return blocks_of((first for first, _ in self.pairs), self.first_layer, self.num_layers)

    @property
    def effective_depth(self) -> int:
        return self.num_layers - (len(self.pairs) if self.kind == "pair" else len(self.removed))

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of all paired layers, ascending; in a control those of them that stay. They are what is trained."""
        return tuple(i for pair in self.pairs for i in pair if i not in self.removed)

    @property
    def first_layer(self) -> int:
        """The lowest layer that is paired, gone or changed: below it original and paired model are the same."""
        return min([self.pairs[0][0], *self.removed, *self.merged])

    def __str__(self) -> str:
        pairs = " ".join(f"{first}+{second}" for first, second in self.pairs)
        if self.kind != "pair":
            gone = f"without layers {' '.join(map(str, self.removed))}" if self.removed else "all layers in order"
            return f"control {self.kind}: {gone}, depth {self.num_layers} -> {self.effective_depth}"
        return f"{len(self.pairs)} pairs ({pairs}), depth {self.num_layers} -> {self.effective_depth}"


@dataclass(frozen=True)
class AutoPairs:
    """How many pairs ``plan.pairs: auto:...`` asks for; which ones, lp_train/selection chooses.

    ``pairs``: so many. ``loss``: as many as keep the KL to the original, untuned and on calibration text, at or below
    so many nats per token. ``depth``: the fewest that bring the effective depth down to this share of the layers.
    """

    kind: Literal["pairs", "loss", "depth"]
    limit: float

    @classmethod
    def parse(cls, spec: object) -> "AutoPairs | None":
        """Reads ``"auto:8"``, ``"auto:loss<=0.1"``, ``"auto:depth<=0.7"``; None for any other plan.

        Raises:
            UserError: begins with ``auto:`` and is none of them, or its number can never be reached.
        """
        if not isinstance(spec, str) or not spec.strip().startswith(AUTO):
            return None
        match = re.fullmatch(r"auto:(?:(loss|depth)<=)?(\d+(?:\.\d*)?|\.\d+)", re.sub(r"\s", "", spec))
        if match is None or (match[1] is None and not match[2].isdigit()):
            raise UserError(f"plan.pairs {spec!r}: not understood; give {AUTO_FORMS}")
        auto = cls(cast(Literal["loss", "depth"], match[1]) if match[1] else "pairs", float(match[2]))
        if auto.limit == 0:
            raise UserError(f"plan.pairs {spec!r}: must be above 0; give {AUTO_FORMS}")
        if auto.kind == "depth" and not 0.5 <= auto.limit < 1:
            raise UserError(f"plan.pairs {spec!r}: pairs can halve the depth at most; give 0.5 to 0.99")
        return auto

    def count(self, num_layers: int) -> int | None:
        """The number of pairs for so many layers; None where the KL decides.

        Raises:
            UserError: more pairs than the layers make.
        """
        if self.kind == "loss":
            return None
        if self.kind == "pairs" and self.limit > num_layers // 2:
            most = f"{num_layers} layers make {num_layers // 2} pairs at most"
            raise UserError(f"plan.pairs 'auto:{self.limit:.0f}': {most}; give auto:{num_layers // 2} or less")
        return int(self.limit) if self.kind == "pairs" else num_layers - math.floor(self.limit * num_layers + 1e-9)


def blocks_of(pairs: Iterable[int], start: int, end: int) -> list[tuple[int, ...]]:
    """The layers from ``start`` to before ``end`` in order, two for a pair, else one; ``pairs``: the first layers of
    those that are paired."""
    firsts = {first for first in pairs if start <= first < end}
    return [(i, i + 1) if i in firsts else (i,) for i in range(start, end) if i - 1 not in firsts]


def _read_window(spec: str, num_layers: int) -> list[tuple[int, int]]:
    if spec.strip().startswith(AUTO):
        raise _Wrong(f"pairs are chosen when a run starts, whose resolved_config.yaml then has them; else give {FORMS}")
    match = re.fullmatch(r"(\d+):(\d+)", spec.strip())
    if match is None:
        raise _Wrong(f"not understood; give {FORMS}")
    start, end = int(match[1]), int(match[2])
    nearest = [f"{start}:{e}" for e in (end - 1, end + 1) if start < e <= num_layers]
    if (end - start) % 2 and nearest:  # without one it is out of range or empty, which is told later
        rule = f"a window needs an even number of layers, this has {end - start}"
        raise _Wrong(f"{rule}; use {' or '.join(nearest)}")
    return [(i, i + 1) for i in range(start, end, 2)]


def _read_pairs(spec: Any) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(pair) for pair in spec]
    except TypeError:
        raise _Wrong(f"not understood; give {FORMS}") from None
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(i, int) and not isinstance(i, bool) for i in pair):
            raise _Wrong(f"{list(pair)} is not a pair of layer numbers; give {FORMS}")
    return pairs
