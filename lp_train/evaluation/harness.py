"""lm-eval's model interface over a model that is there already, for several variants of it, on all processes.

Plain ``HFLM`` gives the same numbers. It projects every position to the vocabulary, runs equal inputs again, encodes
text by text, and with a model that is loaded already believes to be alone.
"""

import functools
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lp_train.adapters import autocast
from lp_train.bench.shapes import layer_shapes
from lp_train.cluster.shard import inside
from lp_train.distill.losses import Head, rows_per_chunk
from lp_train.errors import UserError
from lp_train.evaluation.fidelity import Variant, shared_out
from lp_train.pairing.families import decoder_of

Request = tuple[Any, list[int], list[int]]  # unused, context, continuation
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}  # enough that a small model keeps the device busy
ROWS_PER_GENERATION = {"cpu": 8, "cuda": 256}  # at most; on a GPU as many as their cache has room for
REQUESTS_AT_A_TIME = 4096  # are encoded while the model works on those before


class Batch(NamedTuple):
    """Inputs of one forward, padded on the right, and what is asked of them: the n-th question is the token
    ``targets[n]`` after ``input_ids[rows[n], positions[n]]``; it counts for request ``owners[n]``."""

    input_ids: Tensor  # [B, T]
    rows: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor


class HarnessModel(HFLM):
    """``loglikelihood``, ``loglikelihood_rolling`` and ``generate_until`` answer for each of ``variants``:
    ``{name: [response of each request]}``, on every process. ``batch_size``: rows in a forward; None: by tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        variants: Mapping[str, Variant],
        dtype: torch.dtype,
        state: PartialState,
        batch_size: int | None = None,
    ) -> None:
        kind = state.device.type
        half = None if dtype == torch.float32 else dtype  # float32 adapters compute in half precision, as in training
        at_most = batch_size or ROWS_PER_GENERATION[kind]
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=at_most, mixed_precision_dtype=half)
        self.variants, self.state = variants, state
        self.rows, self.tokens_per_batch = batch_size, TOKENS_PER_BATCH[kind]
        self.tokens = 0  # of log-likelihoods, through all variants on all processes
        self._encoded: dict[tuple[str, bool | None], list[int]] = {}
        self._tasks: list[str | None] = []  # which each request belongs to, for messages

    # --- text to tokens ----------------------------------------------------------------------------------------------

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """As ``HFLM``, from what :meth:`_encode_ahead` has encoded all at once."""
        if (tokens := self._encoded.get((string, add_special_tokens))) is None:
            tokens = super().tok_encode(string, add_special_tokens, **kwargs)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def _encode_ahead(self, strings: Iterable[str], add_special_tokens: bool | None = None) -> None:
        """All at once but texts that start with the prefix token, to which HFLM adds none."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        texts = [text for text in dict.fromkeys(strings) if not text.startswith(prefix)]
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if texts:
            encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
            self._encoded.update(zip(((text, add_special_tokens) for text in texts), encoded, strict=True))

    # --- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> dict[str, list[tuple[float, bool]]]:
        """Of each request's continuation after its context: (nats, whether it is the greedy answer).

        Raises:
            UserError: context and continuation are longer than the model's context.
        """
        parts = [requests[i : i + REQUESTS_AT_A_TIME] for i in range(0, len(requests), REQUESTS_AT_A_TIME)]
        with ThreadPoolExecutor(1) as ahead:  # the next parts are encoded while the model is busy with those before
            found = [self._score_all(*prepared) for prepared in ahead.map(self._prepare, parts)]
        sums = {name: _gathered([of_part[name] for of_part in found]) for name in self.variants}
        return {name: [(nats, wrong == 0) for nats, wrong in values] for name, values in sums.items()}

    def _prepare(self, requests: list[Instance]) -> tuple[list[Batch], int]:
        pairs = [request.args for request in requests]
        self._encode_ahead(text for c, answer in pairs if c for text in (c.rstrip(), c + answer))
        self._encode_ahead((answer for context, answer in pairs if not context), add_special_tokens=False)
        self._tasks = [request.task_name for request in requests]
        prepared = super().loglikelihood(requests, disable_tqdm=True)
        self._encoded.clear()
        return prepared, len(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> dict[str, list[float]]:
        """Of each whole text, in windows of the model's context that do not overlap in what they predict."""
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            owners += [i] * (len(windows) - len(owners))
        found, sums = self._score_all(self._loglikelihood_tokens(windows), len(windows)), {}
        for name in self.variants:
            nats = [nats for nats, _ in _gathered([found[name]])]
            sums[name] = np.bincount(owners, weights=nats, minlength=len(requests)).tolist()
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Batch]:
        """Not the answers as in ``HFLM`` but what :meth:`_score_all` needs to find them: batches from the longest
        inputs to the shortest, each input once."""
        inputs: dict[bytes, int] = {}
        texts: list[np.ndarray] = []
        asked: list[list[tuple[int, list[int]]]] = []  # of each input: request and continuation
        for i, (_, context, answer) in enumerate(requests):
            self._check_length(i, len(context) + len(answer) - 1)
            text = np.array((context + answer)[:-1], dtype=np.int64)
            place = inputs.setdefault(text.tobytes(), len(texts))
            if place == len(texts):
                texts.append(text)
                asked.append([])
            asked[place].append((i, answer))
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        batches, start = [], 0
        while start < len(order):
            rows = self.rows or max(self.tokens_per_batch // len(texts[order[start]]), 1)
            part = order[start : start + rows]
            batches.append(self._batch([texts[place] for place in part], [asked[place] for place in part]))
            start += rows
        self.tokens += sum(len(text) for text in texts) * len(self.variants)
        return batches

    def _batch(self, texts: list[np.ndarray], asked: list[list[tuple[int, list[int]]]]) -> Batch:
        input_ids = np.zeros((len(texts), len(texts[0])), dtype=np.int64)  # padding on the right is never looked at
        for row, text in enumerate(texts):
            input_ids[row, : len(text)] = text
        flat = [(row, *question) for row, of_row in enumerate(asked) for question in of_row]
        lengths = np.array([len(answer) for _, _, answer in flat])
        ends = np.array([len(texts[row]) for row, _, _ in flat])  # an answer is the end of its input, one token on
        steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths), lengths)  # -n .. -1 within each answer
        rows, positions = np.repeat([row for row, _, _ in flat], lengths), np.repeat(ends, lengths) + steps
        targets = np.concatenate([answer for _, _, answer in flat]).astype(np.int64)
        owners = np.repeat([owner for _, owner, _ in flat], lengths)
        batch = Batch(*(torch.from_numpy(array) for array in (input_ids, rows, positions, targets, owners)))
        # pinned, or the copy to a GPU would wait until it has done all that it was given
        return Batch(*(tensor.pin_memory() for tensor in batch)) if self.device.type == "cuda" else batch

    def _check_length(self, request: int, tokens: int) -> None:
        if tokens > self.max_length:
            rule = f"an item has {tokens:,} tokens with its examples, the model takes {self.max_length:,}"
            remedy = "lower evaluate.num_fewshot or leave the task out"
            raise UserError(f"task {self._tasks[request]}: {rule}; {remedy}")

    def _score_all(self, batches: list[Batch], requests: int) -> dict[str, Tensor]:
        """:meth:`_score` for each variant, on this process's share and without waiting for the device."""
        shares = list(shared_out(len(batches), 1, self.state.process_index, self.state.num_processes))
        mine = [batches[share.start] for share, _ in shares]
        on_device = [Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch)) for batch in mine]
        found = {}
        for name, variant in self.variants.items():
            with variant(self.model):
                counted = sum(counts for _, counts in shares)
                found[name] = inside(self.model, self._score, on_device, counted, requests, name)
        return found

    @torch.no_grad()
    def _score(self, batches: list[Batch], counted: int, requests: int, name: str) -> Tensor:
        """[requests, 2]: log-likelihood in nats, and how many tokens are not the most likely ones. Zero for requests
        of which another process has the batch; of ``batches`` the first ``counted`` count."""
        head, decoder = Head.of(self.model), decoder_of(self.model)
        sums = torch.zeros(requests, 2, dtype=torch.float64, device=self.device)
        quiet = self.state.process_index > 0 or len(batches) < 4
        for i, batch in enumerate(tqdm(batches, desc=f"{name}: log-likelihoods", disable=quiet, leave=False)):
            with self._autocast():
                hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
                values = _answers(head, hidden[batch.rows, batch.positions], batch.targets)
            if i < counted:
                sums.index_add_(0, batch.owners, values)
        return sums

    def _autocast(self) -> torch.autocast:
        return autocast(self.mixed_precision_dtype or torch.float32, self.device)

    # --- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> dict[str, list[str]]:
        """The greedy answer to each request, up to its stop sequences."""
        self._encode_ahead(request.args[0] for request in requests)
        self._tasks = [request.task_name for request in requests]
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self._encoded.clear()
        totals = [n + r.args[1].get("max_gen_toks", self.max_gen_toks) for n, r in zip(lengths, requests, strict=True)]
        for i, total in enumerate(totals):
            self._check_length(i, total)
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        # as many on each process, since they share out by it: what the fewest have room for
        rows = min(gather_object([self.rows or min(self.batch_size, self._rows_with_room(max(totals)))]))
        found = {}
        for name, variant in self.variants.items():
            with variant(self.model):
                found[name] = self._generate(requests, order, rows, name)
        return found

    def _rows_with_room(self, tokens: int) -> int:
        """How many rows' keys and values take half of a GPU's free memory."""
        if self.device.type != "cuda":
            return self.batch_size
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return max((free + unused) // 2 // (tokens * cache_bytes_per_token(self.model)), 1)

    def _generate(self, requests: list[Instance], order: list[int], rows: int, name: str) -> list[str]:
        answers: list[tuple[int, str]] = []
        shares = list(shared_out(len(order), rows, self.state.process_index, self.state.num_processes))
        quiet = self.state.process_index > 0
        for share, counts in tqdm(shares, desc=f"{name}: answers", disable=quiet, leave=False):
            part = [order[i] for i in share]
            of_part = functools.partial(super().generate_until, [requests[i] for i in part], disable_tqdm=True)
            texts = inside(self.model, of_part)
            answers += zip(part, texts, strict=True) if counts else []
        return [text for _, text in sorted(gather_object(answers))]


def cache_bytes_per_token(model: nn.Module) -> int:
    """Of keys and values in all layers, in the precision of the weights."""
    return 2 * sum(layer.keys for layer in layer_shapes(model)) * model.dtype.itemsize


def _gathered(parts: list[Tensor]) -> list[list[float]]:
    """The sum over all processes of [N, 2], given in parts."""
    return reduce(torch.cat(parts), "sum").tolist() if parts else []


def _answers(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [N, D], targets [N] -> [N, 2]: log-probability of the target, and whether another token is likelier."""
    values = torch.empty(len(targets), 2, dtype=torch.float64, device=targets.device)
    rows = rows_per_chunk(targets.device)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits, target = head.logits(hidden[part]), targets[part, None]
        # as HFLM: in float32 on a CPU logsumexp is nearer to float64, and 1e-5 of a nat a token from HFLM's figures
        values[part, 0] = logits.log_softmax(-1).gather(1, target)[:, 0].double()
        values[part, 1] = (logits.argmax(-1) != target[:, 0]).double()
    return values
