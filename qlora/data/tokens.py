"""Examples to tokens with a loss mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qlora.data.formats import Completion, Conversation, Example
from qlora.data.template import adds_bos, render
from qlora.errors import DataError


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

    def encode(self, example: Example) -> TokenizedExample:
        """Encodes one example.

        Raises:
            DataError: The template refuses it, or rewrites earlier turns.
        """
        if isinstance(example, Completion):
            return self._encode_completion(example)
        return self._encode_conversation(example)

    def _encode_completion(self, example: Completion) -> TokenizedExample:
        prompt = self._ids(example.prompt)
        ids = self._ids(example.prompt + example.completion)
        if ids[: len(prompt)] != prompt:
            # A token would straddle the border; whoever serves the prompt alone never sees that token.
            ids = prompt + self._ids(example.completion)
        ids = [*self._bos, *ids, self.tokenizer.eos_token_id]
        masked = len(self._bos) + len(prompt) if self.loss_on == "assistant" else 0
        return make_example(ids, [position >= masked for position in range(len(ids))])

    def _encode_conversation(self, example: Conversation) -> TokenizedExample:
        messages = example.messages
        text = render(self.tokenizer, messages)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = encoding.input_ids, np.array([start for start, _ in encoding.offset_mapping])
        mask = np.full(len(ids), self.loss_on == "all")
        for turn, message in enumerate(messages):
            if message["role"] == "assistant" and self.loss_on == "assistant":
                begin, end = self._turn_span(messages, turn, text)
                mask |= self._until_end_token(np.asarray(ids), (starts >= begin) & (starts < end))
        if mask.any() and not np.isin(np.asarray(ids)[mask], self._end_ids).any():
            # The template ends no answer; without this the model would never stop.
            ids, mask = [*ids, self.tokenizer.eos_token_id], np.append(mask, True)
        return make_example(ids, mask)

    def _turn_span(self, messages: list[dict[str, str]], turn: int, text: str) -> tuple[int, int]:
        """Characters of the whole text that a turn's answer takes."""
        before = render(self.tokenizer, messages[:turn], add_generation_prompt=True)
        until = text if turn == len(messages) - 1 else render(self.tokenizer, messages[: turn + 1])
        for shorter, longer in pairwise((before, until, text)):
            if not longer.startswith(shorter):
                raise DataError("the chat template rewrites earlier turns, so an answer's place can't be told.")
        return len(before), len(until)

    def _until_end_token(self, ids: np.ndarray, span: np.ndarray) -> np.ndarray:
        """Cuts what a template writes behind the end token of a turn: a server stops before it."""
        ends = np.flatnonzero(span & np.isin(ids, self._end_ids))
        return span & (np.arange(len(ids)) <= ends[-1]) if len(ends) else span

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
