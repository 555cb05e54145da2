"""Documents to token ids, with a mask of the tokens that "completion" training learns.

Plain text: every token and the EOS after it. Prompt and completion: the completion and its EOS. Chat: every assistant
turn with its end-of-turn token. The chat masks come from the template's ``{% generation %}`` marks where the template
or TRL has them, else from rendering the conversation up to each turn.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained
from trl.data_utils import common_prefix_length

from lp_train.data.sources import Document
from lp_train.errors import UserError

T = TypeVar("T")
# Large enough for the tokenizer's threads, small enough that little is tokenised past the last document needed.
_BATCH_CHARACTERS = 200_000
_BATCH_DOCUMENTS = 256
# Llama 3.2's template writes today's date unless it is given one. Its own fallback keeps a run the same tomorrow.
_TEMPLATE_VARIABLES: dict[str, Any] = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Tokens:
    """A document as ``ids`` [T] int32 and ``trained`` [T] bool; ``dropped`` tokens were cut off its end.

    ``masked``: it is of a kind of which only a part is trained.
    """

    ids: np.ndarray
    trained: np.ndarray
    masked: bool = False
    dropped: int = 0

    def cut(self, length: int) -> "Tokens":
        """Its first ``length`` tokens."""
        dropped = self.dropped + max(len(self.ids) - length, 0)
        return Tokens(self.ids[:length], self.trained[:length], self.masked, dropped)


class Encoder:
    """Tokenises documents with one tokenizer; ``max_length`` cuts each document (``data.truncate``).

    Raises:
        UserError: the tokenizer has no EOS token, so that documents would run into each other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path or 'tokenizer'}: no EOS token to end documents; set its eos_token"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._marked_template: str | None = None
        if tokenizer.chat_template is not None:
            self._marked_template = _template_with_marks(tokenizer)

    def encode_stream(self, documents: Iterable[tuple[T, Document]]) -> Iterator[tuple[T, Tokens]]:
        """Tokenises lazily, a batch at a time; what stands beside each document is passed on."""
        batch: list[tuple[T, Document]] = []
        characters = 0
        for number, document in documents:
            batch.append((number, document))
            characters += document.size
            if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
                yield from self._encode_batch(batch)
                batch, characters = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[tuple[T, Document]]) -> Iterator[tuple[T, Tokens]]:
        for (beside, _), tokens in zip(batch, self.encode([d for _, d in batch]), strict=True):
            yield beside, tokens if self.max_length is None else tokens.cut(self.max_length)

    def encode(self, documents: list[Document]) -> list[Tokens]:
        """Tokens of each document, in the same order, at full length.

        Raises:
            UserError: chats with a tokenizer without a template, or with a template whose turns cannot be told apart.
        """
        encoded: dict[int, Tokens] = {}
        encoders = {"text": self._encode_texts, "completion": self._encode_completions, "chat": self._encode_chats}
        for form, encode in encoders.items():
            numbers = [number for number, document in enumerate(documents) if _form(document) == form]
            if numbers:
                encoded.update(zip(numbers, encode([documents[number] for number in numbers]), strict=True))
        return [encoded[number] for number in range(len(documents))]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"]

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _encode_texts(self, documents: list[Document]) -> list[Tokens]:
        rows = [self._with_eos(ids) for ids in self._ids([document.text for document in documents])]
        return [Tokens(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in rows]

    def _encode_completions(self, documents: list[Document]) -> list[Tokens]:
        prompts = self._ids([document.prompt or "" for document in documents])
        wholes = self._ids([(document.prompt or "") + document.text for document in documents])
        encoded = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            ids = self._with_eos(whole)
            # As in TRL: tokens may merge across the boundary, then the completion starts where the two differ.
            start = common_prefix_length(prompt, ids)
            encoded.append(Tokens(np.array(ids, np.int32), np.arange(len(ids)) >= start, masked=True))
        return encoded

    def _encode_chats(self, documents: list[Document]) -> list[Tokens]:
        name = self.tokenizer.name_or_path or "tokenizer"
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{name}: no chat template for data with messages; use the instruct model, or prompt/completion"
            )
        if not self.tokenizer.is_fast:
            raise UserError(f"{name}: chat masks need a fast tokenizer; save it with a tokenizer.json")
        try:
            if self._marked_template:
                return [self._encode_by_marks(document) for document in documents]
            return self._encode_by_prefixes(documents)
        except TemplateError as error:
            raise UserError(
                f"{name}: the chat template refuses a conversation ({error}); mend or leave it out"
            ) from None

    def _encode_by_marks(self, document: Document) -> Tokens:
        output = self._apply_template(
            document.messages,
            chat_template=self._marked_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, trained = output["input_ids"], np.array(output["assistant_masks"], bool)
        if document.context:
            prompt = self._apply_template(
                document.messages[: document.context],
                chat_template=self._marked_template,
                return_dict=True,
                add_generation_prompt=True,
            )
            trained[: common_prefix_length(prompt["input_ids"], ids)] = False
        return Tokens(np.array(ids, np.int32), self._without_outer_space(ids, trained), masked=True)

    def _without_outer_space(self, ids: list[int], trained: np.ndarray) -> np.ndarray:
        """The mask without blank tokens at the ends of a turn.

        TRL's templates mark the line break of the generation prompt before a turn, or the one after its end, as the
        model's: it is given the first and stops before the second.
        """
        blank = np.array([token in self._blank_ids for token in ids])
        edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        kept = np.zeros_like(trained)
        for first, last in edges:
            written = np.flatnonzero(~blank[first:last])
            if len(written):
                kept[first + written[0] : first + written[-1] + 1] = True
        return kept

    @functools.cached_property
    def _blank_ids(self) -> set[int]:
        """Ids of the tokens that are only white space."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        return {token for token, text in enumerate(texts) if text.isspace()}

    def _encode_by_prefixes(self, documents: list[Document]) -> list[Tokens]:
        texts, spans = zip(*(self._render_with_spans(document) for document in documents), strict=True)
        encoding = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encoded = []
        for ids, offsets, turns in zip(encoding["input_ids"], encoding["offset_mapping"], spans, strict=True):
            starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
            trained = np.zeros(len(ids), bool)
            for first, last in turns:
                # A token that also holds a character outside the turn is left out; so are empty ones.
                trained |= (starts >= first) & (ends <= last) & (starts < ends)
            encoded.append(Tokens(np.array(ids, np.int32), trained, masked=True))
        return encoded

    def _render_with_spans(self, document: Document) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and from which to which character its trained turns run."""
        whole = self._render(document.messages)
        spans = []
        for number, message in enumerate(document.messages):
            if message["role"] != "assistant" or number < document.context:
                continue
            before = self._render(document.messages[:number], add_generation_prompt=True)
            after = self._render(document.messages[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"{self.tokenizer.name_or_path or 'tokenizer'}: its chat template renders turn {number + 1} of "
                    f"{str(message['content'])[:40]!r} differently alone than in the conversation, so no mask can be "
                    "made; use a template with {% generation %} marks, or leave such conversations out"
                )
            # Templates end a turn with its token and a line break; the model's part ends with the token.
            spans.append((len(before), len(after.rstrip())))
        return whole, spans

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self._apply_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _apply_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **_TEMPLATE_VARIABLES, **options)


def _form(document: Document) -> str:
    if document.messages:
        return "chat"
    return "text" if document.prompt is None else "completion"


def _template_with_marks(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with ``{% generation %}`` marks that include the end of a turn: the tokenizer's own, or TRL's."""
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except (ValueError, TypeError, TemplateError):  # TRL knows no variant, or its probes do not suit the template
        return None
    return template if is_chat_template_stop_token_trained(tokenizer, template) else None
