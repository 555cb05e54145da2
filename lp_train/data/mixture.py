"""Which documents are drawn for training and evaluation, and in which order. Train, eval, calibration are disjoint."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from lp_train.config import DataConfig
from lp_train.data.sources import Document, OpenSource, Role, open_source
from lp_train.data.tokens import Encoder, Tokens
from lp_train.errors import UserError

_ROLES: tuple[Role, ...] = ("train", "eval", "calibration")


def held_out(key: bytes, fraction: float) -> bool:
    """Whether the document of this key belongs to the share held out for evaluation; the same in every run."""
    return int.from_bytes(key[:8], "big") < fraction * 2**64


@dataclass
class Separation:
    """The views of the sources for each role, and the documents left out of training.

    ``eval`` must be drawn before ``train``: a streamed evaluation source says only then what it holds.
    """

    train: list[OpenSource]
    eval: list[OpenSource]
    calibration: list[OpenSource]
    excluded: set[bytes]  # keys of documents that training met and left out


def separate(data: DataConfig) -> Separation:
    """Opens all sources and keeps the roles apart, by their paths and by the text of every document.

    Raises:
        UserError: a source that cannot be opened, or the same rows in two roles.
    """
    opened = {role: [open_source(s, role) for s in getattr(data, role) or []] for role in _ROLES}
    _refuse_shared_rows(opened)
    calibration = {document.key for source in opened["calibration"] for document in source.shuffled(seed=0)}
    evaluated, excluded = set[bytes](), set[bytes]()

    def share(key: bytes) -> Role:
        """Of the training sources' documents: a role without text of its own has a share, by hash."""
        if data.eval is None and held_out(key, data.eval_fraction):
            return "eval"
        # the other end of the hashes: neither share moves with the other
        chosen = data.calibration is None and not held_out(key, 1 - data.calibration_fraction)
        return "calibration" if chosen else "train"

    def keep_for_eval(key: bytes) -> bool:
        if key not in calibration:
            evaluated.add(key)
        return key not in calibration

    def keep_for_training(key: bytes) -> bool:
        if key in evaluated or key in calibration:
            excluded.add(key)
        return key not in excluded

    def of_training(keep: Callable[[bytes], bool]) -> list[OpenSource]:
        return [replace(source, keep=keep) for source in opened["train"]]

    evaluation = [replace(source, keep=keep_for_eval) for source in opened["eval"]]
    for view in evaluation:
        if not view.streamed:  # all of it, however little is drawn: training data do not depend on eval's size
            for _ in view.shuffled(seed=0):
                pass
    train = of_training(lambda key: share(key) == "train" and keep_for_training(key))
    if data.eval is None:
        evaluation = of_training(lambda key: share(key) == "eval" and keep_for_eval(key))
    chosen = of_training(lambda key: share(key) == "calibration" and key not in evaluated)
    return Separation(train, evaluation, opened["calibration"] or chosen, excluded)


def _refuse_shared_rows(opened: dict[Role, list[OpenSource]]) -> None:
    for first, second in itertools.combinations(_ROLES, 2):
        for one, other in itertools.product(opened[first], opened[second]):
            if shared := sorted(one.identity & other.identity):
                remedy = "give each its own text, or leave data.eval out to hold documents out by themselves"
                raise UserError(f"{one.label}: {shared[0]} is also in data.{second}; {remedy}")
    for source in opened["calibration"]:
        if source.streamed:
            raise UserError(f"{source.label}: calibration text is read whole, to keep it apart; set streaming: false")


def draw_eval(sources: list[OpenSource], encoder: Encoder, tokens: int, seed: int) -> list[Tokens]:
    """The first ``tokens`` tokens of the shuffled sources, the same share of each as far as it has that much."""
    drawn: list[Tokens] = []
    left = tokens
    for number, source in enumerate(sources):
        share = left // (len(sources) - number)
        for document in encoder.encode_stream(source.shuffled(seed)):
            if share <= 0:
                break
            # Cut by us and not lost to training: not counted as dropped.
            drawn.append(replace(document.cut(share), dropped=document.dropped))
            share -= len(drawn[-1].ids)
            left -= len(drawn[-1].ids)
    return drawn


def draw_train(sources: list[OpenSource], encoder: Encoder, tokens: int | None, seed: int) -> list[Tokens]:
    """Documents until there are ``tokens`` tokens, or (None) until every source was read once.

    Sources without weights are shuffled together and read once at most. With weights, the next document always comes
    from the source that is furthest behind its share of tokens; an exhausted one starts again.
    """
    if sources[0].source.weight is None:
        stream = encoder.encode_stream(_pooled(sources, seed))
    else:
        stream = _weighted(sources, encoder, seed, once=tokens is None)
    drawn: list[Tokens] = []
    total = 0
    with tqdm(total=tokens, desc="tokenising", unit="tok", unit_scale=True, delay=3, leave=False) as bar:
        for document in stream:
            drawn.append(document)
            total += len(document.ids)
            bar.update(len(document.ids))
            if tokens is not None and total >= tokens:
                break
    return drawn


def _pooled(sources: list[OpenSource], seed: int) -> Iterator[Document]:
    """All documents of all sources once, in one shuffled order."""
    streamed = [source.label for source in sources if source.streamed]
    if streamed and len(sources) > 1:
        raise UserError(f"{streamed[0]}: a streamed source has no known size to mix by; give all sources a weight")
    if streamed:
        yield from sources[0].shuffled(seed)
        return
    starts = np.cumsum([0, *map(len, sources)])
    for position in np.random.default_rng(seed).permutation(starts[-1]):
        number = int(np.searchsorted(starts, position, side="right")) - 1
        yield from sources[number].numbered(int(position - starts[number]))


def _weighted(sources: list[OpenSource], encoder: Encoder, seed: int, once: bool) -> Iterator[Tokens]:
    streams = [encoder.encode_stream(source.shuffled(seed)) for source in sources]
    drawn = [0.0] * len(sources)  # tokens over weight
    rounds = [0] * len(sources)  # each in another order
    while True:
        number = drawn.index(min(drawn))
        source, document = sources[number], next(streams[number], None)
        if document is None:
            if not drawn[number]:
                none_left = "no document is left to train on (all empty, held out, or in data.eval)"
                raise UserError(f"{source.label}: {none_left}")
            rounds[number] += 1
            if once and min(rounds) > 0:
                return
            streams[number] = encoder.encode_stream(source.shuffled(seed + rounds[number]))
            continue
        drawn[number] += max(len(document.ids), 1) / (source.source.weight or 1.0)
        yield document
