"""Examples to tokens with a loss mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qlora.data.formats import Completion, Example
from qlora.data.template import adds_bos, render
from qlora.errors import DataError

# Put before a text that continues another, and cut off again: the first that does not merge with it serves.
LEADS = ("a", "\n", ".", "0")


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One document.

    Attributes:
        input_ids: (length,), int32.
        loss_mask: (length,), bool: the token is to be predicted. The first never is: nothing comes before it.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that are to be predicted."""
        return int(self.loss_mask.sum())

    def __getitem__(self, span: slice) -> "TokenizedExample":
        """A part of the document, as a document of its own."""
        return make_example(self.input_ids[span], self.loss_mask[span].copy())


def make_example(input_ids: Any, loss_mask: Any) -> TokenizedExample:
    """Builds an example from ids and a mask, any sequences of equal length."""
    mask = np.asarray(loss_mask, dtype=bool)
    mask[:1] = False
    return TokenizedExample(np.asarray(input_ids, dtype=np.int32), mask)


def supervised_bytes(tokenizer: Any, examples: Sequence[TokenizedExample]) -> int:
    """Bytes of UTF-8 that the supervised tokens of examples stand for, special tokens left out."""
    texts = (tokenizer.decode(example.input_ids[example.loss_mask], skip_special_tokens=True) for example in examples)
    return sum(len(text.encode()) for text in texts)


class ExampleEncoder:
    """Turns examples into tokens with one tokenizer, whose template is in place.

    Args:
        tokenizer: A fast tokenizer of transformers, with an EOS token.
        loss_on: `assistant`, its turns with their end tokens, or `all`.

    Raises:
        DataError: The tokenizer has no EOS token, so nothing would teach the model to stop.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "assistant") -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no EOS token, so a model could not learn to stop; set its eos_token.")
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self._bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        # What starts a text ends none, unless one token does both.
        starts = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
        self._end_ids = np.array(sorted({*tokenizer.all_special_ids, *added} - starts))

    def encode(self, example: Example) -> list[TokenizedExample]:
        """Encodes one example: as one document, or as one per answer where a template asks for that.

        Raises:
            DataError: The template refuses it, or an answer can't be told from its prompt.
        """
        if isinstance(example, Completion):
            return [self._encode_completion(example)]
        return self._encode_conversation(example.messages)

    def _encode_completion(self, example: Completion) -> TokenizedExample:
        border = len(example.prompt) if self.loss_on == "assistant" else 0
        ids, starts = self._tokens(example.prompt + example.completion, [len(example.prompt)])
        mask = [*(False for _ in self._bos), *(starts >= border), True]
        return make_example([*self._bos, *ids, self.tokenizer.eos_token_id], mask)

    def _encode_conversation(self, messages: list[dict[str, str]]) -> list[TokenizedExample]:
        text = render(self.tokenizer, messages)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._answer_span(messages, turn, text) for turn in turns]
        if all(spans) or self.loss_on == "all":
            return [self._encode_text(text, [span for span in spans if span], turns[-1:] == [len(messages) - 1])]
        # The template writes earlier turns anew, as those that drop past reasoning do. A server then asks for each
        # answer with its own rendering of what came before, so each becomes a document.
        return [self._encode_answer(messages[: turn + 1]) for turn in turns]

    def _encode_answer(self, messages: list[dict[str, str]]) -> TokenizedExample:
        text = render(self.tokenizer, messages)
        span = self._answer_span(messages, len(messages) - 1, text)
        if span is None:
            raise DataError(
                "the chat template's prompt is not how its rendering of the answer begins, so the answer's place can't "
                "be told; set data.chat_template to chatml, or to a jinja file made for training."
            )
        return self._encode_text(text, [span], ends_with_answer=True)

    def _encode_text(self, text: str, answers: list[tuple[int, int]], ends_with_answer: bool) -> TokenizedExample:
        """Encodes a rendered conversation whose answers take the given spans of characters."""
        ids, starts = self._tokens(text, [begin for begin, _ in answers])
        mask = np.full(len(ids), self.loss_on == "all")
        for begin, end in answers:
            mask |= self._until_end_token(ids, (starts >= begin) & (starts < end))
        if ends_with_answer and not np.isin(ids[mask], self._end_ids).any():
            # The template ends no answer; without this the model would never stop.
            return make_example([*ids, self.tokenizer.eos_token_id], [*mask, True])
        return make_example(ids, mask)

    def _answer_span(self, messages: list[dict[str, str]], turn: int, text: str) -> tuple[int, int] | None:
        """Characters of the whole text that an answer takes; None if the template rewrites what is before it."""
        before = render(self.tokenizer, messages[:turn], add_generation_prompt=True)
        until = text if turn == len(messages) - 1 else render(self.tokenizer, messages[: turn + 1])
        grows = until.startswith(before) and text.startswith(until)
        return (len(before), len(until)) if grows else None

    def _until_end_token(self, ids: np.ndarray, span: np.ndarray) -> np.ndarray:
        """Cuts what a template writes behind the end token of a turn: a server stops before it."""
        ends = np.flatnonzero(span & np.isin(ids, self._end_ids))
        return span & (np.arange(len(ids)) <= ends[-1]) if len(ends) else span

    def _tokens(self, text: str, borders: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text and where each starts, no token reaching over a border.

        Whoever serves a prompt alone never sees a token that also holds the first characters of the answer.
        """
        ids, spans = self._encode_piece(text)
        crossed = [border for border in borders if any(start < border < end for start, end in spans)]
        if crossed:
            ids, spans = [], []
            for begin, end in pairwise([0, *crossed, len(text)]):
                piece_ids, piece_spans = self._encode_piece(text[begin:end], continues=begin > 0)
                ids += piece_ids
                spans += [(begin + first, begin + last) for first, last in piece_spans]
        return np.array(ids, dtype=np.int64), np.array([start for start, _ in spans], dtype=np.int64)

    def _encode_piece(self, text: str, continues: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and spans of a text; one that continues another gets no mark of a text's beginning."""
        for lead in LEADS if continues else ("",):
            encoding = self.tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            skipped = self.tokenizer(lead, add_special_tokens=False).input_ids if lead else []
            if encoding.input_ids[: len(skipped)] == skipped:
                spans = [(start - len(lead), end - len(lead)) for start, end in encoding.offset_mapping[len(skipped) :]]
                return encoding.input_ids[len(skipped) :], spans
        return self._encode_piece(text)
