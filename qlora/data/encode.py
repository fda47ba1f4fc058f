"""Examples to tokens with the weight of each, many at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from qlora.data.formats import Completion, Conversation, Example, Labelled, Preference, Rated, Tokens
from qlora.data.serving import QUESTION, TemplateFacts
from qlora.data.template import adds_bos, render
from qlora.data.tokens import TokenizedExample, make_example
from qlora.errors import DataError

# Put before a text that continues another, and cut off again: the first that does not merge with it serves.
LEADS = ("a", "\n", ".", "0")


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of one example.

    Attributes:
        documents: Its tokens; of a preference two, and of a conversation one per answer where its template asks for it.
        per_answer: The template writes earlier turns anew, so every answer became a document.
        eos_added: The template ends no answer, so the tokenizer's EOS was put behind the last one.
    """

    documents: list[TokenizedExample]
    per_answer: bool = False
    eos_added: bool = False


@dataclass(slots=True)
class _Draft:
    """A document before its text is tokenized.

    Attributes:
        answers: Where the text's answers begin and end, in characters, and their weights.
        weight: Of all that is no answer.
        is_chat: Its answers end with an end token of their template.
        needs_end: Its last answer is learnt, so EOS is added if it has no end token.
        starts: Ids put in front.
    """

    text: str
    answers: list[tuple[int, int, float]]
    weight: float
    is_chat: bool = True
    needs_end: bool = False
    starts: list[int] = field(default_factory=list)


class ExampleEncoder:
    """Turns examples into tokens with one tokenizer, whose template is in place.

    Args:
        tokenizer: A fast tokenizer of transformers, with an EOS token.
        loss_on: `assistant`, its turns with their end tokens; `last`, the last of them; or `all`, prompts too.

    Raises:
        DataError: The tokenizer has no EOS token, so nothing would teach the model to stop, or is no fast one.
    """

    def __init__(self, tokenizer: Any, loss_on: str = "assistant") -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no EOS token, so a model could not learn to stop; set its eos_token.")
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} can't tell which characters a token stands for; use a fast one."
            )
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.facts = TemplateFacts(tokenizer)
        self._bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        # What starts a text ends none, unless one token does both.
        starts = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
        self._end_ids = np.array(sorted({*tokenizer.all_special_ids, *added} - starts))

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """Encodes examples, each to its documents or to the reason why it can't be."""
        drafts: list[list[_Draft] | DataError] = []
        for example in examples:
            try:
                drafts.append(self._draft(example))
            except DataError as error:
                drafts.append(error)
        texts = [draft.text for group in drafts if not isinstance(group, DataError) for draft in group]
        encodings = iter(self._tokenize(texts).encodings if texts else ())
        results: list[Encoded | DataError] = []
        for example, group in zip(examples, drafts, strict=True):
            if isinstance(group, DataError):
                results.append(group)
            elif isinstance(example, Tokens):
                results.append(_take(example))
            else:
                finished = [self._finish(draft, next(encodings)) for draft in group]
                documents = [document for document, _ in finished]
                per_answer = len(documents) > 1 and not isinstance(example, Preference)
                results.append(Encoded(documents, per_answer, any(added for _, added in finished)))
        return results

    def _draft(self, example: Example) -> list[_Draft]:
        if isinstance(example, Completion):
            begin, text = len(example.prompt), example.prompt + example.completion
            weight = float(self.loss_on == "all")
            return [_Draft(text, [(begin, len(text), 1.0)], weight, is_chat=False, needs_end=True, starts=self._bos)]
        if isinstance(example, Labelled):
            return [_Draft(example.text, [], 0.0, is_chat=False, starts=self._bos)]
        if isinstance(example, Preference):
            return self._draft_pair(example)
        if isinstance(example, Rated):
            return self._draft_conversation(example.conversation)
        return [] if isinstance(example, Tokens) else self._draft_conversation(example)

    def _draft_pair(self, example: Preference) -> list[_Draft]:
        """Both ways to go on; what they share is no answer to choose, so the last turn alone is learnt."""
        pair = []
        for conversation in (example.chosen, example.rejected):
            weights = [0.0] * (len(conversation.messages) - 1) + [1.0]
            pair += self._draft_conversation(Conversation(conversation.messages, conversation.tools, weights))
        return pair

    def _draft_conversation(self, conversation: Conversation) -> list[_Draft]:
        messages, tools = conversation.messages, conversation.tools
        self.facts.check(messages, tools)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        given = conversation.weights or [1.0] * len(messages)
        weights = {turn: given[turn] for turn in turns}
        if self.loss_on == "last":
            weights = {turn: weight if turn == turns[-1] else 0.0 for turn, weight in weights.items()}
        base = float(self.loss_on == "all")
        sought = [turn for turn in turns if weights[turn] or base]
        if sought[:1] == [0] and not base:
            raise DataError("the conversation begins with an answer, which nothing asks for; take that turn out.")
        text = render(self.tokenizer, messages, tools)
        spans = {turn: self._answer_span(messages, tools, turn, text) for turn in sought}
        if all(span or weights[turn] == base for turn, span in spans.items()):
            answers = [(*span, weights[turn]) for turn, span in spans.items() if span]
            ends_with_answer = turns[-1:] == [len(messages) - 1] and weights[turns[-1]] > 0
            return [_Draft(text, answers, base, needs_end=ends_with_answer)]
        # The template writes earlier turns anew, as those that drop past reasoning do. A server then asks for each
        # answer with its own rendering of what came before, so each becomes a document.
        return [self._draft_answer(messages[: turn + 1], tools, weights[turn]) for turn in sought if weights[turn]]

    def _draft_answer(self, messages: list[dict[str, Any]], tools: Any, weight: float) -> _Draft:
        text = render(self.tokenizer, messages, tools)
        span = self._answer_span(messages, tools, len(messages) - 1, text)
        if span is None:
            raise DataError(
                "the chat template's prompt is not how its rendering of the answer begins, so the answer's place can't "
                "be told; set data.chat_template to chatml, or to a jinja file made for training."
            )
        return _Draft(text, [(*span, weight)], 0.0, needs_end=True)

    def _answer_span(self, messages: list[dict[str, Any]], tools: Any, turn: int, text: str) -> tuple[int, int] | None:
        """Characters of the whole text that an answer takes; None if the template rewrites what is before it."""
        before = render(self.tokenizer, messages[:turn], tools, add_generation_prompt=True) if turn else ""
        until = text if turn == len(messages) - 1 else render(self.tokenizer, messages[: turn + 1], tools)
        grows = until.startswith(before) and text.startswith(until)
        return (len(before), len(until)) if grows else None

    def _finish(self, draft: _Draft, encoding: Any) -> tuple[TokenizedExample, bool]:
        """Tokens of a draft, and whether EOS was added to them for want of an end token."""
        borders = [begin for begin, _, _ in draft.answers]
        if any(_is_crossed(encoding, draft.text, border) for border in borders):
            ids, first_token = self._tokens_by_pieces(draft.text, borders)
        else:
            ids, first_token = np.array(encoding.ids, dtype=np.int32), _FirstToken(encoding, len(draft.text))
        weights = np.full(len(ids), draft.weight, dtype=np.float16)
        for begin, end, weight in draft.answers:
            span = slice(first_token(begin), first_token(end))
            if draft.is_chat:
                # What a template writes behind the end token of a turn is not learnt: a server stops before it.
                ends = np.flatnonzero(np.isin(ids[span], self._end_ids))
                if len(ends):
                    span = slice(span.start, span.start + int(ends[-1]) + 1)
            weights[span] = weight
        has_end = draft.is_chat and bool(np.isin(ids[weights > 0], self._end_ids).any())
        last = [draft.answers[-1][2] if draft.answers else 1.0] if draft.needs_end and not has_end else []
        ids = np.concatenate([draft.starts, ids, [self.tokenizer.eos_token_id] * len(last)])
        weights = np.concatenate([[0.0] * len(draft.starts), weights, last])
        return make_example(ids, weights), draft.is_chat and bool(last)

    def _tokens_by_pieces(self, text: str, borders: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Ids of a text cut at borders, no token reaching over one, and a function from a character to its token.

        Whoever serves a prompt alone never sees a token that also holds the first characters of the answer.
        """
        ids: list[int] = []
        starts: list[int] = []
        for begin, end in pairwise(sorted({0, *borders, len(text)})):
            piece_ids, piece_starts = self._encode_piece(text[begin:end], continues=begin > 0)
            ids += piece_ids
            starts += [begin + start for start in piece_starts]
        places = np.array(starts, dtype=np.int64)
        return np.array(ids, dtype=np.int32), lambda char: int(np.searchsorted(places, char))

    def _encode_piece(self, text: str, continues: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a text and where each starts; one that continues another gets no mark of a text's beginning."""
        for lead in LEADS if continues else ("",):
            encoding = self._tokenize([lead + text]).encodings[0]
            skipped = self._tokenize([lead]).encodings[0].ids if lead else []
            if encoding.ids[: len(skipped)] == skipped:
                starts = [max(0, start - len(lead)) for start, _ in encoding.offsets[len(skipped) :]]
                return encoding.ids[len(skipped) :], starts
        return self._encode_piece(text)

    def _tokenize(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)


def answer_end_id(tokenizer: Any) -> int:
    """The id that ends an answer through the tokenizer's chat template: what training teaches to stop with."""
    conversation = Conversation([QUESTION, {"role": "assistant", "content": "b"}])
    (encoded,) = ExampleEncoder(tokenizer).encode([conversation])
    if isinstance(encoded, DataError):
        return int(tokenizer.eos_token_id)
    (example,) = encoded.documents
    return int(example.input_ids[example.loss_mask][-1])


class _FirstToken:
    """From a character of a text to the first token that begins at it or behind it."""

    def __init__(self, encoding: Any, length: int) -> None:
        self._encoding, self._length = encoding, length

    def __call__(self, char: int) -> int:
        for place in range(char, self._length):  # a normalizer may have left out a few characters
            token = self._encoding.char_to_token(place)
            if token is not None:
                return token if self._encoding.token_to_chars(token)[0] >= char else token + 1
        return len(self._encoding.ids)


def _is_crossed(encoding: Any, text: str, border: int) -> bool:
    """Whether a token holds characters from both sides of a border."""
    if not 0 < border < len(text):
        return False
    token = encoding.char_to_token(border)
    if token is not None and encoding.token_to_chars(token)[0] < border:
        return True
    # Byte-level tokenizers leave a word's leading space out of the characters that they say its token stands for.
    return text[border - 1] == " " and encoding.char_to_token(border - 1) is None


def _take(example: Tokens) -> Encoded | DataError:
    if min(example.input_ids, default=0) < 0 or not all(isinstance(token, int) for token in example.input_ids):
        return DataError("input_ids should be whole numbers from 0.")
    return Encoded([make_example(example.input_ids, example.weights)])
