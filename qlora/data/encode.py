"""Examples to tokens with the weight of each, many at a time."""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from qlora.data.examples import Completion, Conversation, Example, Labelled, Preference, Rated, Tokens
from qlora.data.serving import ANSWER, QUESTION, TemplateFacts
from qlora.data.template import adds_bos, render
from qlora.data.tokens import TokenizedExample, make_example
from qlora.errors import DataError

# Put before a text that continues another, and cut off again: the first that does not merge with it serves.
LEADS = ("a", "\n", ".", "0")

# Tokens before the blanks in front of a border that are held against those of the text before it alone.
COMPARED = 2

# Where the text of each token begins and ends.
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of one example.

    Attributes:
        documents: Its tokens; of a preference two, and of a conversation one per answer where its template asks for it.
        per_answer: The template writes earlier turns anew, or a token would join an earlier answer to its prompt, so
            every answer became a document.
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

    def by_answer(self) -> "list[_Draft]":
        """Each of its answers that is learnt as a document that ends with it."""
        return [
            _Draft(self.text[:end], [(begin, end, weight)], 0.0, needs_end=True)
            for begin, end, weight in self.answers
            if weight
        ]


@dataclass(frozen=True, slots=True)
class Begun:
    """Examples on their way: rendered, and being tokenized.

    Attributes:
        examples: As they were given.
        drafts: Of each, or why there are none.
        encodings: Of the drafts' texts, when they are done.
    """

    examples: Sequence[Example]
    drafts: list[list[_Draft] | DataError]
    encodings: Future[list[Any]]


class ExampleEncoder:
    """Turns examples into tokens with one tokenizer, whose template is in place.

    Args:
        tokenizer: A fast tokenizer of transformers, with an EOS token.
        loss_on: `assistant`, its turns with their end tokens; `last`, the last of them; or `all`, prompts too. Of what
            was judged, as preferences are, it is the last turn in any case.

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
        self._end_ids = {*tokenizer.all_special_ids, *added} - starts
        self._beside = ThreadPoolExecutor(max_workers=1)

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """Encodes examples, each to its documents or to the reason why it can't be."""
        return self.finish(self.begin(examples))

    def begin(self, examples: Sequence[Example]) -> Begun:
        """Renders examples and has their texts tokenized while the caller goes on; see :meth:`finish`."""
        drafts: list[list[_Draft] | DataError] = []
        for example in examples:
            try:
                drafts.append(self._draft(example))
            except DataError as error:
                drafts.append(error)
        texts = [draft.text for group in drafts if not isinstance(group, DataError) for draft in group]
        return Begun(examples, drafts, self._beside.submit(self._tokenize, texts))

    def finish(self, begun: Begun) -> list[Encoded | DataError]:
        """What :meth:`encode` gives, for examples that were begun."""
        encodings = iter(begun.encodings.result())
        results: list[Encoded | DataError] = []
        for example, group in zip(begun.examples, begun.drafts, strict=True):
            if isinstance(group, DataError):
                results.append(group)
            elif isinstance(example, Tokens):
                results.append(_take(example))
            else:
                finished = [document for draft in group for document in self._finish(draft, next(encodings))]
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
            return [*self._draft_verdict(example.chosen), *self._draft_verdict(example.rejected)]
        if isinstance(example, Rated):
            return self._draft_verdict(example.conversation)
        return [] if isinstance(example, Tokens) else self._draft_conversation(example, float(self.loss_on == "all"))

    def _draft_verdict(self, conversation: Conversation) -> list[_Draft]:
        """A conversation of which the last turn was judged: it alone is learnt, whatever the loss is on."""
        messages = conversation.messages
        if messages[-1]["role"] != "assistant":
            raise DataError(f"it should end with the answer that was judged, not with a {messages[-1]['role']} turn.")
        weights = [0.0] * (len(messages) - 1) + [1.0]
        return self._draft_conversation(Conversation(messages, conversation.tools, weights))

    def _draft_conversation(self, conversation: Conversation, base: float = 0.0) -> list[_Draft]:
        """Drafts of a conversation; the base is the weight of all that is no answer."""
        messages, tools = conversation.messages, conversation.tools
        self.facts.check(messages, tools)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        given = conversation.weights or [1.0] * len(messages)
        weights = {turn: given[turn] for turn in turns}
        if self.loss_on == "last":
            weights = {turn: weight if turn == turns[-1] else 0.0 for turn, weight in weights.items()}
        sought = [turn for turn in turns if weights[turn] or base]
        if sought[:1] == [0] and not base:
            raise DataError("the conversation begins with an answer, which nothing asks for; take that turn out.")
        if sought and not base:
            messages = messages[: sought[-1] + 1]  # nothing is learnt from what follows
        text = render(self.tokenizer, messages, tools)
        self.facts.check_written([message for message in messages if message["role"] != "assistant"], text)
        spans = {turn: self._answer_span(messages, tools, turn, text) for turn in sought}
        for turn, span in spans.items():
            if span is not None:
                self.facts.check_written([messages[turn]], text[slice(*span)])
        if all(span or weights[turn] == base for turn, span in spans.items()):
            answers = [(*span, weights[turn]) for turn, span in spans.items() if span]
            ends_with_answer = turns[-1:] == [len(messages) - 1] and weights[turns[-1]] > 0
            return [_Draft(text, answers, base, needs_end=ends_with_answer)]
        if base:
            raise DataError("data.loss_on: all can't weigh single turns where the template writes earlier ones anew.")
        # The template writes earlier turns anew, as those that drop past reasoning do. A server then asks for each
        # answer with its own rendering of what came before, so each becomes a document.
        return [self._draft_answer(messages[: turn + 1], tools, weights[turn]) for turn in sought if weights[turn]]

    def _draft_answer(self, messages: list[dict[str, Any]], tools: Any, weight: float) -> _Draft:
        text = render(self.tokenizer, messages, tools)
        self.facts.check_written(messages[-1:], text)
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

    def _finish(self, draft: _Draft, encoding: Any) -> list[tuple[TokenizedExample, bool]]:
        """Documents of a draft, and whether EOS was added to each for want of an end token."""
        spans: Spans = _Spans(encoding)
        ids = encoding.ids
        borders = [begin for begin, _, _ in draft.answers]
        stretches = pairwise([0, *borders])
        crossed = [border for start, border in stretches if self._is_crossed(draft.text, start, border, encoding)]
        if crossed and crossed[0] < borders[-1] and not draft.weight:
            # A server that tokenizes the whole prompt of a later answer merges what is cut before an earlier one.
            parts = draft.by_answer()
            encodings = self._tokenize([part.text for part in parts])
            return [pair for part, own in zip(parts, encodings, strict=True) for pair in self._finish(part, own)]
        if crossed:
            ids, spans = self._tokens_by_pieces(draft.text, crossed)
        weights, has_end = self._weights(draft, ids, spans)
        # A text may have its marks already.
        starts = [] if ids[: len(draft.starts)] == draft.starts else draft.starts
        has_end = has_end or not draft.is_chat and ids[-1:] == [self.tokenizer.eos_token_id]
        last = [draft.answers[-1][2] if draft.answers else 1.0] if draft.needs_end and not has_end else []
        ids = [*starts, *ids, *[self.tokenizer.eos_token_id] * len(last)]
        if starts or last:
            weights = np.concatenate([[0.0] * len(starts), weights, last])
        return [(make_example(ids, weights), draft.is_chat and bool(last))]

    def _weights(self, draft: _Draft, ids: list[int], spans: Spans) -> tuple[np.ndarray, bool]:
        """The weight of each token, and whether what is learnt ends with an end token."""
        weights = np.full(len(ids), draft.weight, dtype=np.float16)
        has_end = False
        for begin, end, weight in draft.answers or [(0, len(draft.text), draft.weight)]:
            first, stop = _first_token(spans, begin), _first_token(spans, end)
            backwards = range(stop - 1, first - 1, -1) if draft.is_chat else ()
            last = next((place for place in backwards if ids[place] in self._end_ids), None)
            # A special token with text of the answer behind it, as a tag around a call, ends nothing.
            has_end = last is not None and not draft.text[spans[last][1] : end].strip()
            # What a template writes behind the last end token of a turn is not learnt: every server has stopped there.
            weights[first : last + 1 if has_end and last is not None else stop] = weight
        return weights, has_end

    def _is_crossed(self, text: str, start: int, border: int, encoding: Any) -> bool:
        """Whether the text before a border has other tokens by itself, as a server feeds it; start is in front of it.

        Either a token holds characters of both sides, or the tokenizer treats blanks at the end of a text otherwise
        than between words.
        """
        if not 0 < border < len(text):
            return False
        here, before = encoding.char_to_token(border), encoding.char_to_token(border - 1)
        if here is not None and encoding.token_to_chars(here)[0] < border:
            return True
        blanks = len(text[start:border]) - len(text[start:border].rstrip())
        # Byte-level tokenizers may leave blanks out of the characters that they say a token stands for.
        if here is not None and before is not None and encoding.token_to_chars(before)[0] <= border - blanks:
            return False
        alone = self._tokenize([text[start:border]])[0].ids
        whole = encoding.ids[: _first_token(_Spans(encoding), border)]
        count = blanks + COMPARED  # as many tokens as the blanks may be, and those before
        return alone[-count:] != whole[-count:][-len(alone) :]

    def _tokens_by_pieces(self, text: str, borders: Sequence[int]) -> tuple[list[int], Spans]:
        """Ids of a text cut at borders, no token reaching over one, and their spans.

        Whoever serves a prompt alone never sees a token that also holds the first characters of the answer.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for begin, end in pairwise(sorted({0, *borders, len(text)})):
            piece_ids, piece_spans = self._encode_piece(text[begin:end], continues=begin > 0)
            ids += piece_ids
            spans += [(begin + first, begin + last) for first, last in piece_spans]
        return ids, spans

    def _encode_piece(self, text: str, continues: bool = False) -> tuple[list[int], Spans]:
        """Ids of a text and their spans; one that continues another gets no mark of a text's beginning."""
        for lead in LEADS if continues else ("",):
            (encoding,) = self._tokenize([lead + text])
            skipped = self._tokenize([lead])[0].ids if lead else []
            if encoding.ids[: len(skipped)] == skipped:
                spans = [
                    (max(0, begin - len(lead)), end - len(lead)) for begin, end in encoding.offsets[len(skipped) :]
                ]
                return encoding.ids[len(skipped) :], spans
        return self._encode_piece(text)

    def _tokenize(self, texts: list[str]) -> list[Any]:
        """Encodings of tokenizers itself: transformers would make lists of all that they can tell."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend.encode_batch(texts, add_special_tokens=False)


def answer_end_id(tokenizer: Any) -> int:
    """The id that ends an answer through the tokenizer's chat template: what training teaches to stop with."""
    conversation = Conversation([QUESTION, ANSWER])
    (encoded,) = ExampleEncoder(tokenizer).encode([conversation])
    if isinstance(encoded, DataError):
        return int(tokenizer.eos_token_id)
    (example,) = encoded.documents
    return int(example.input_ids[example.loss_mask][-1])


class _Spans(Sequence[tuple[int, int]]):
    """Characters that each token of an encoding stands for, told one at a time: few are asked for."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, token: Any) -> Any:
        return self._encoding.token_to_chars(token)


def _first_token(spans: Spans, char: int) -> int:
    """The first token that begins at a character or behind it."""
    # Sought by their ends: where blanks are left out of a token's span, it seems to begin behind them.
    token = bisect_right(spans, char, key=itemgetter(1))
    return token + (token < len(spans) and spans[token][0] < char)


def _take(example: Tokens) -> Encoded | DataError:
    wrong = [token for token in example.input_ids if not isinstance(token, int) or not 0 <= token < 2**31]
    if wrong:
        return DataError(f"input_ids should be ids of tokens, whole numbers from 0, not {wrong[0]!r}.")
    return Encoded([make_example(example.input_ids, example.weights)])
