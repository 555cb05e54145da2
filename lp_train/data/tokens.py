"""Documents to token ids, with a mask of the tokens that "completion" training learns.

Plain text: every token and the EOS after it. Prompt and completion: the completion and its EOS. Chat: every assistant
turn with its end-of-turn token. Where turns run comes from the ``{% generation %}`` marks of the template or of TRL's
variant of it, else from rendering the conversation up to each turn.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained
from trl.data_utils import common_prefix_length

from lp_train.data.sources import Document
from lp_train.errors import UserError

Turn = tuple[int, int]  # from which to which character of the rendered conversation
# Large enough for the tokenizer's threads, small enough that little is tokenised past the last document needed.
_BATCH_CHARACTERS = 200_000
_BATCH_DOCUMENTS = 256
# Llama 3.2's template writes today's date unless it is given one. Its own fallback keeps a run the same tomorrow.
_TEMPLATE_VARIABLES: dict[str, Any] = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class Tokens:
    """A document as ``ids`` [T] int32 and ``trained`` [T] bool; ``dropped`` tokens were cut off its end.

    ``masked``: it is of a kind of which only a part is trained. ``path`` and ``domain`` as in :class:`Document`.
    """

    ids: np.ndarray
    trained: np.ndarray
    masked: bool = False
    dropped: int = 0
    path: str = ""
    domain: str = ""

    def cut(self, length: int) -> "Tokens":
        """Its first ``length`` tokens; the others count as dropped."""
        dropped = self.dropped + max(len(self.ids) - length, 0)
        return replace(self, ids=self.ids[:length], trained=self.trained[:length], dropped=dropped)


class Encoder:
    """Tokenises documents with one tokenizer; ``max_length`` cuts each document (``data.truncate``).

    Raises:
        UserError: the tokenizer has no EOS token, so that documents would run into each other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.name = tokenizer.name_or_path or "tokenizer"
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: no EOS token to end documents; set its eos_token")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.marked_template = _template_with_marks(tokenizer) if tokenizer.chat_template is not None else None

    def encode_stream(self, documents: Iterable[Document]) -> Iterator[Tokens]:
        """Tokenises lazily, a batch at a time."""
        batch: list[Document] = []
        characters = 0
        for document in documents:
            batch.append(document)
            characters += document.size
            if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
                yield from self.encode(batch)
                batch, characters = [], 0
        yield from self.encode(batch)

    def encode(self, documents: list[Document]) -> list[Tokens]:
        """Tokens of each document, in the same order.

        Raises:
            UserError: chats with a tokenizer without a template, or with a template whose turns cannot be told apart.
        """
        chats = iter(self._encode_chats([document for document in documents if document.messages]))
        others = iter(self._encode_texts([document for document in documents if not document.messages]))
        return [next(chats if document.messages else others) for document in documents]

    def _tokens(self, document: Document, ids: list[int], trained: np.ndarray) -> Tokens:
        masked = document.prompt is not None or bool(document.messages)
        tokens = Tokens(np.array(ids, np.int32), trained, masked, path=document.path, domain=document.domain)
        return tokens if self.max_length is None else tokens.cut(self.max_length)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"] if texts else []

    def _encode_texts(self, documents: list[Document]) -> list[Tokens]:
        eos = self.tokenizer.eos_token_id
        prompts = self._ids([document.prompt or "" for document in documents])
        wholes = self._ids([(document.prompt or "") + document.text for document in documents])
        encoded = []
        for document, prompt, ids in zip(documents, prompts, wholes, strict=True):
            ids = ids if ids[-1:] == [eos] else [*ids, eos]
            # As in TRL: tokens may merge across the boundary, then the completion starts where the two differ.
            start = 0 if document.prompt is None else common_prefix_length(prompt, ids)
            encoded.append(self._tokens(document, ids, np.arange(len(ids)) >= start))
        return encoded

    def _encode_chats(self, documents: list[Document]) -> list[Tokens]:
        if documents and self.tokenizer.chat_template is None:
            rule = "no chat template for data with messages; use the instruct model, or prompt/completion"
            raise UserError(f"{self.name}: {rule}")
        if documents and not self.tokenizer.is_fast:
            raise UserError(f"{self.name}: chat masks need a fast tokenizer; save it with a tokenizer.json")
        try:
            return [self._encode_chat(document) for document in documents]
        except TemplateError as error:
            message = f"{self.name}: the chat template refuses a conversation ({error}); mend or leave it out"
            raise UserError(message) from None

    def _encode_chat(self, document: Document) -> Tokens:
        text, turns = self._marked_turns(document) if self.marked_template else self._turns_by_prefixes(document)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts, ends = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
        trained = np.zeros(len(starts), bool)
        for first, last in turns:
            # A token that also holds a character outside the turn is left out; so are empty ones.
            trained |= (starts >= first) & (ends <= last) & (starts < ends)
        return self._tokens(document, encoding["input_ids"], trained)

    def _marked_turns(self, document: Document) -> tuple[str, list[Turn]]:
        """The rendered conversation, and its trained turns by the template's marks.

        TRL's templates mark the line break of the generation prompt before a turn, or the one after its end, as the
        model's: it is given the first and stops before the second.
        """
        text, turns = self._render(document.messages, self.marked_template, return_assistant_tokens_mask=True)
        given = sum(message["role"] == "assistant" for message in document.messages[: document.context])
        written = [(first, text[first:last]) for first, last in turns[given:]]
        return text, [(at + len(turn) - len(turn.lstrip("\n")), at + len(turn.rstrip())) for at, turn in written]

    def _turns_by_prefixes(self, document: Document) -> tuple[str, list[Turn]]:
        """The same without marks: a turn is what the conversation up to it has more than the generation prompt."""
        whole, _ = self._render(document.messages)
        turns = []
        for number, message in enumerate(document.messages):
            if message["role"] != "assistant" or number < document.context:
                continue
            before, _ = self._render(document.messages[:number], add_generation_prompt=True)
            after, _ = self._render(document.messages[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                turn = f"turn {number + 1} of {str(message['content'])[:40]!r}"
                rule = f"its chat template renders {turn} differently alone than in the conversation"
                remedy = "use a template with {% generation %} marks, or leave such conversations out"
                raise UserError(f"{self.name}: {rule}, so no mask can be made; {remedy}")
            # Templates end a turn with its token and a line break; the model's part ends with the token.
            turns.append((len(before), len(after.rstrip())))
        return whole, turns

    def _render(
        self, messages: list[dict[str, Any]], template: str | None = None, **options: Any
    ) -> tuple[str, list[Turn]]:
        """As the tokenizer's own ``apply_chat_template``, which does not say between which characters the marks are."""
        variables = {**self.tokenizer.special_tokens_map, **_TEMPLATE_VARIABLES}
        template = template or self.tokenizer.get_chat_template()
        found: Any = render_jinja_template([messages], chat_template=template, **options, **variables)
        (text,), marks = found
        return text, marks[0] if marks else []


def _template_with_marks(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with ``{% generation %}`` marks that include the end of a turn: the tokenizer's own, or TRL's."""
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except (ValueError, TypeError, TemplateError):  # TRL knows no variant, or its probes do not suit the template
        return None
    return template if is_chat_template_stop_token_trained(tokenizer, template) else None
