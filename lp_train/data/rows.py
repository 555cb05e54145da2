"""Packed rows for training and evaluation, and the collator that makes batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from lp_train.config import Config, DataConfig
from lp_train.data.mixture import draw_eval, draw_train, separate
from lp_train.data.sources import OpenSource
from lp_train.data.tokens import Encoder, Tokens
from lp_train.errors import UserError

IGNORED = -100  # Transformers' label of a position that is not trained
MAX_DROPPED = 0.01  # of all tokens


@dataclass(frozen=True)
class DataStats:
    """What stands in the data. Tokens count documents, not padding; ``sources`` holds training tokens by path.

    ``trained_tokens`` are the labels that are not -100, in training rows. ``dropped_tokens`` were cut off by
    ``data.truncate``. ``excluded_documents`` were met in training sources and also stand in eval or calibration.
    """

    documents: int
    tokens: int
    trained_tokens: int
    dropped_tokens: int
    rows: int
    eval_tokens: int
    eval_rows: int
    excluded_documents: int
    sources: dict[str, int]

    def __str__(self) -> str:
        left_out = f", {self.excluded_documents:,} documents left out of training" if self.excluded_documents else ""
        return (
            f"{self.tokens:,} tokens ({self.trained_tokens:,} trained) of {self.documents:,} documents in "
            f"{self.rows:,} rows; held out {self.eval_tokens:,} tokens in {self.eval_rows:,} rows{left_out}"
        )


@dataclass(frozen=True)
class Data:
    """Packed rows: columns ``input_ids``, ``labels``, ``seq_lengths`` and, where they differ, ``ce_labels``; in
    ``eval`` also ``domain``, for each token the place of its document's domain in ``domains``. ``calibration``: where
    it was asked for."""

    train: Dataset
    eval: Dataset
    stats: DataStats
    domains: list[str]
    calibration: Dataset | None = None


def data_of(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    train_tokens: int | None,
    eval_tokens: int | None = None,
    calibration_tokens: int = 0,
) -> Data:
    """Reads, splits, tokenises and packs the data that a configuration says, as much as is asked for.

    Reading stops once there are ``train_tokens`` tokens (None: everything is read) and ``eval_tokens`` held-out ones
    (None: ``evaluate.tokens``).
    ``calibration_tokens``: as many of calibration text, the same for every seed, or as there are.
    Rows hold up to ``train.max_length`` tokens of whole documents; longer ones are split. ``labels`` are the tokens
    themselves where they are trained (``loss.kd_on`` all: everywhere), else -100, as is the first token of every piece,
    which nothing predicts. With ``kd_on`` all and masked documents, ``ce_labels`` are those of "completion".

    Raises:
        UserError: sources that cannot be read or overlap; no token, no trained token; no evaluation or calibration
            text; more than 1 % of the tokens lost without ``data.truncate``.
    """
    data, max_length, seed = config.data, config.train["max_length"], config.train["seed"]
    encoder, everywhere = Encoder(tokenizer, max_length if data.truncate else None), config.loss.kd_on == "all"
    views = separate(data)
    held_out = draw_eval(views.eval, encoder, eval_tokens or config.evaluate.tokens, seed)
    if not held_out and data.eval is not None:
        raise UserError("data.eval: no evaluation row; its documents are empty or all in data.calibration")
    if not held_out:
        rule = "no document of data.train that has text is held out by its hash"
        raise UserError(f"data.eval_fraction {data.eval_fraction}: {rule}; raise the fraction, or give data.eval")
    calibration = _calibration(data, views.calibration, encoder, calibration_tokens, max_length, everywhere)
    documents = draw_train(views.train, encoder, train_tokens, seed)
    if not documents:
        raise UserError("data.train: zero tokens; all documents are empty, held out, or also in data.eval")
    two_labels = everywhere and any(document.masked for document in documents + held_out)
    train = pack(documents, max_length, everywhere, two_labels)
    domains = sorted({document.domain for document in held_out})
    evaluation = pack(held_out, max_length, everywhere, two_labels, domains)
    for name, rows in (("train", train), ("eval", evaluation)):
        if not _trained(rows):
            why = "no assistant turn or completion, or only one-token documents"
            remedy = "check the roles, or set loss.kd_on all"
            raise UserError(f"data.{name}: zero trained tokens ({why}); {remedy}")
    stats = _count(data, documents, train, evaluation, len(views.excluded))
    share = stats.dropped_tokens / (stats.tokens + stats.dropped_tokens)
    if share > MAX_DROPPED and not data.truncate:
        raise UserError(f"data.train: packing lost {share:.1%} of the tokens (at most 1 %); set data.truncate true")
    return Data(train, evaluation, stats, domains, calibration)


def _calibration(
    data: DataConfig, views: list[OpenSource], encoder: Encoder, tokens: int, max_length: int, everywhere: bool
) -> Dataset | None:
    if not tokens:
        return None
    documents = draw_eval(views, encoder, tokens, seed=0)
    rows = pack(documents, max_length, everywhere) if documents else None
    if rows is None or not _trained(rows):
        if data.calibration is not None:
            raise UserError("data.calibration: no trained token to choose pairs by; give documents that have text")
        share = f"data.calibration_fraction {data.calibration_fraction}"
        rule = "no document of data.train has its hash in this share, to choose pairs by"
        raise UserError(f"{share}: {rule}; raise it, or give data.calibration")
    return rows


def pack(
    documents: list[Tokens],
    max_length: int,
    train_all: bool = False,
    two_labels: bool = False,
    domains: list[str] | None = None,
) -> Dataset:
    """Packs documents into rows of up to ``max_length`` tokens with the columns of :class:`Data`.

    ``train_all``: every token is a label; ``two_labels``: ``ce_labels`` are then those of the trained ones.
    ``domains``: the column ``domain`` holds the place of the document's domain in them.
    """
    lengths = [len(document.ids) for document in documents]
    ids = np.concatenate([document.ids for document in documents])
    labels = np.where(np.concatenate([document.trained for document in documents]), ids, IGNORED).astype(np.int32)
    columns = {"input_ids": ids, "labels": ids if train_all else labels}
    if two_labels:
        columns["ce_labels"] = labels
    if domains is not None:
        places = [domains.index(document.domain) for document in documents]
        columns["domain"] = np.repeat(np.array(places, np.int32), lengths)
    # The narrow type on purpose: more than 2^31 tokens in memory is an error here and not an overflow.
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
    table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})
    packed = pack_dataset(Dataset(table), max_length, "bfd_split", {"desc": "packing"})
    rows = packed.with_format("arrow")[:].combine_chunks()
    sizes = _flat(packed, "seq_lengths")
    for name in ("labels", "ce_labels"):
        if name in columns:
            column = rows[name].combine_chunks()
            values = column.flatten().to_numpy().copy()
            values[np.cumsum(sizes) - sizes] = IGNORED  # the first token of a piece follows nothing
            masked = pa.ListArray.from_arrays(column.offsets, values)
            rows = rows.set_column(rows.column_names.index(name), name, masked)
    return Dataset(rows)


def _count(data: DataConfig, documents: list[Tokens], train: Dataset, evaluation: Dataset, excluded: int) -> DataStats:
    by_source = dict.fromkeys((source.path for source in data.train), 0)
    for document in documents:
        by_source[document.path] += len(document.ids)
    tokens = int(_flat(train, "seq_lengths").sum())
    return DataStats(
        documents=len(documents),
        tokens=tokens,
        trained_tokens=_trained(train),
        dropped_tokens=sum(document.dropped for document in documents) + sum(by_source.values()) - tokens,
        rows=len(train),
        eval_tokens=int(_flat(evaluation, "seq_lengths").sum()),
        eval_rows=len(evaluation),
        excluded_documents=excluded,
        sources=by_source,
    )


def _trained(rows: Dataset) -> int:
    return int((_flat(rows, "labels") != IGNORED).sum())


def _flat(rows: Dataset, column: str) -> np.ndarray:
    return rows.with_format("arrow")[column].combine_chunks().flatten().to_numpy()


@dataclass(frozen=True)
class RowCollator:
    """Pads rows to ``max_length``: ``input_ids``, ``labels``, ``position_ids`` and what else is there, [B, T] int64.

    Of the rows one after the other, ``trained`` [N] int64 says which tokens are followed by a trained one, and
    ``cu_seq_lens`` [documents + 1] int32 where each document begins; padding counts as one. Both are made here since
    counting on a GPU makes the program wait for it.

    ``position_ids`` restart at 0 with every document and at every padding token. Given those, ``use_cache=False`` and
    no attention mask, Transformers keeps the documents of a row apart (``find_packed_sequence_indices`` in its
    ``masking_utils``); with a mask or a cache it would not, so none is returned.
    """

    max_length: int
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {"input_ids": self._pad([row["input_ids"] for row in rows], self.pad_token_id)}
        for name in ("labels", "ce_labels", "domain"):
            if name in rows[0]:
                batch[name] = self._pad([row[name] for row in rows], IGNORED)
        positions = [np.concatenate([np.arange(length) for length in row["seq_lengths"]]) for row in rows]
        batch["position_ids"] = self._pad(positions, 0)
        followed = batch["labels"].roll(-1, 1) != IGNORED
        followed[:, -1] = False
        batch["trained"] = followed.flatten().nonzero()[:, 0]
        filled = [[*row["seq_lengths"], self.max_length - sum(row["seq_lengths"])] for row in rows]
        lengths = [length for row in filled for length in row if length]
        batch["cu_seq_lens"] = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        return batch

    def _pad(self, values: list[Any], filler: int) -> torch.Tensor:
        padded = np.full((len(values), self.max_length), filler, np.int64)
        for row, value in zip(padded, values, strict=True):
            row[: len(value)] = value
        return torch.from_numpy(padded)
