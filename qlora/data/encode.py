"""Examples to tokens with the weight of each, many at a time."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from qlora.data.answers import Answer, Draft, draft_conversation
from qlora.data.examples import Completion, Conversation, Example, Labelled, Preference, Rated, Tokens
from qlora.data.serving import ANSWER, QUESTION, TemplateFacts
from qlora.data.template import adds_bos
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
        per_answer: The template writes earlier turns anew, a token would join an earlier answer to its prompt, or an
            earlier answer has no end, so every answer became a document.
        eos_added: An answer has no end of the template's, so the tokenizer's EOS was put behind it.
        switched: Answers by the switch of the template that their prompt needs.
        control_tokens: Control tokens in its turns and tools, and how often.
    """

    documents: list[TokenizedExample]
    per_answer: bool = False
    eos_added: bool = False
    switched: Counter[str] = field(default_factory=Counter)
    control_tokens: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Begun:
    """Examples on their way: rendered, and being tokenized.

    Attributes:
        examples: As they were given.
        drafts: Drafts of each example, or the reason why there are none.
        encodings: Of the drafts' texts, when they are done.
    """

    examples: Sequence[Example]
    drafts: list[list[Draft] | DataError]
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
        # What starts a text ends none, unless one token does both.
        self._end_ids = self.facts.special_ids - ({tokenizer.bos_token_id} - {tokenizer.eos_token_id})
        self._beside = ThreadPoolExecutor(max_workers=1)

    def encode(self, examples: Sequence[Example]) -> list[Encoded | DataError]:
        """Encodes examples, each to its documents or to the reason why it can't be."""
        return self.finish(self.begin(examples))

    def begin(self, examples: Sequence[Example]) -> Begun:
        """Renders examples and has their texts tokenized while the caller goes on; see :meth:`finish`."""
        drafts: list[list[Draft] | DataError] = []
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
                switched = sum((draft.switched for draft in group), Counter[str]())
                control_tokens = self._count_control_tokens(example)
                eos_added = any(added for _, added in finished)
                results.append(Encoded(documents, per_answer, eos_added, switched, control_tokens))
        return results

    def _draft(self, example: Example) -> list[Draft]:
        if isinstance(example, Completion):
            begin, text = len(example.prompt), example.prompt + example.completion
            weight = float(self.loss_on == "all")
            answer = Answer(begin, None, len(text), 1.0)
            return [Draft(text, [answer], weight, is_chat=False, needs_end=True, starts=self._bos)]
        if isinstance(example, Labelled):
            return [Draft(example.text, [], 0.0, is_chat=False, starts=self._bos)]
        if isinstance(example, Preference):
            return [*self._draft_verdict(example.chosen), *self._draft_verdict(example.rejected)]
        if isinstance(example, Rated):
            return self._draft_verdict(example.conversation)
        if isinstance(example, Tokens):
            return []
        return draft_conversation(self.tokenizer, self.facts, example, self.loss_on)

    def _draft_verdict(self, conversation: Conversation) -> list[Draft]:
        """A conversation of which the last turn was judged: it alone is learned, whatever the loss is on."""
        messages = conversation.messages
        if messages[-1]["role"] != "assistant":
            raise DataError(f"it should end with the answer that was judged, not with a {messages[-1]['role']} turn.")
        own = conversation.weights[-1] if conversation.weights else 1.0
        if own == 0:
            raise DataError("the answer that was judged has weight 0, so nothing would be learned; take the mask out.")
        weights = [*[0.0] * (len(messages) - 1), own]
        return draft_conversation(self.tokenizer, self.facts, Conversation(messages, conversation.tools, weights))

    def _count_control_tokens(self, example: Example) -> Counter[str]:
        """Control tokens in the turns and tools of an example."""
        conversations: list[Conversation] = []
        if isinstance(example, Conversation):
            conversations = [example]
        elif isinstance(example, Preference):
            conversations = [example.chosen, example.rejected]
        elif isinstance(example, Rated):
            conversations = [example.conversation]
        return Counter(
            token for each in conversations for token in self.facts.control_tokens([each.messages, each.tools])
        )

    def _finish(self, draft: Draft, encoding: Any) -> list[tuple[TokenizedExample, bool]]:
        """Documents of a draft, and whether EOS was added to each for want of an end token."""
        spans: Spans = _Spans(encoding)
        ids = encoding.ids
        borders = [answer.begin for answer in draft.answers]
        stretches = pairwise([0, *borders])
        crossed = [border for start, border in stretches if self._is_crossed(draft.text, start, border, encoding)]
        for answer in draft.answers:
            crossed += [border for border in answer.part_borders if _is_inside_token(encoding, border)]
            crossed += [answer.end] * self._is_crossed_behind(draft, answer, ids, spans)
        is_endless = any(self._lacks_end(draft, answer, ids, spans) for answer in draft.answers[:-1])
        if not draft.weight and (is_endless or crossed and min(crossed) < borders[-1]):
            # A server that tokenizes the whole prompt of a later answer merges what is cut around an earlier one, and
            # feeds no EOS that would have to be put behind it.
            parts = draft.by_answer()
            encodings = self._tokenize([part.text for part in parts])
            return [pair for part, own in zip(parts, encodings, strict=True) for pair in self._finish(part, own)]
        if crossed:
            ids, spans = self._tokens_by_pieces(draft.text, crossed)
        weights, has_end = self._weights(draft, ids, spans)
        # A text may have its marks already.
        starts = [] if ids[: len(draft.starts)] == draft.starts else draft.starts
        has_end = has_end or not draft.is_chat and ids[-1:] == [self.tokenizer.eos_token_id]
        last = [draft.answers[-1].end_weight] if draft.needs_end and not has_end else []
        ids = [*starts, *ids, *[self.tokenizer.eos_token_id] * len(last)]
        if starts or last:
            weights = np.concatenate([[0.0] * len(starts), weights, last])
        return [(make_example(ids, weights), draft.is_chat and bool(last))]

    def _weights(self, draft: Draft, ids: list[int], spans: Spans) -> tuple[np.ndarray, bool]:
        """The weight of each token, and whether the last answer ends with an end token."""
        weights = np.full(len(ids), draft.weight, dtype=np.float16)
        ends = range(0)
        for answer in draft.answers:
            first, stop = _first_token(spans, answer.begin), _first_token(spans, answer.end)
            ends = self._end(draft, answer, ids, spans) if draft.is_chat else range(stop, stop)
            # What a template writes behind the end token of a turn is not learned: every server has stopped there.
            weights[first : ends.stop] = answer.weight
            if answer.parts:
                weights[first : ends.stop] = answer.token_weights(spans[place] for place in range(first, ends.stop))
            # An end token in the middle of what is said would teach to stop there.
            ending = {*ids[ends.start : ends.stop], self.tokenizer.eos_token_id}
            said = [_first_token(spans, place) for place in answer.control_tokens]
            weights[[place for place in said if place < ends.start and ids[place] in ending]] = 0
        return weights, len(ends) > 0

    def _end(self, draft: Draft, answer: Answer, ids: list[int], spans: Spans) -> range:
        """The tokens that end an answer; empty, and behind its last token, if there are none.

        It is the first special token behind what the answer says; or all up to EOS, if special tokens alone, as those
        that close a tag, lead to that.
        """
        first, stop = _first_token(spans, answer.begin), _first_token(spans, answer.end)
        if answer.said is None:
            # The last one without text behind it: others may be tags around a call.
            places = range(stop - 1, first - 1, -1)
        else:
            places = range(_first_token(spans, answer.said), stop)
        end = next((place for place in places if ids[place] in self._end_ids), None)
        if end is not None and answer.said is None and draft.text[spans[end][1] : answer.end].strip():
            end = None
        # What it says may end with an end token itself, as data made for other trainers does: then that one counts.
        eos = self.tokenizer.eos_token_id
        ending = eos if end is None else ids[end]
        start = own = stop if end is None else end
        while own > first and ids[own - 1] == ending and spans[own - 1][0] in answer.control_tokens:
            own -= 1
        if own < start or end is None:
            return range(own, own + (own < start))
        last = end
        while ids[last] != eos:
            last += 1
            if last == stop or ids[last] not in self._end_ids or spans[last][0] != spans[last - 1][1]:
                return range(end, end + 1)
        return range(end, last + 1)

    def _lacks_end(self, draft: Draft, answer: Answer, ids: list[int], spans: Spans) -> bool:
        """Whether an answer whose end is learned has none."""
        return answer.end_weight > 0 and not self._end(draft, answer, ids, spans)

    def _is_crossed_behind(self, draft: Draft, answer: Answer, ids: list[int], spans: Spans) -> bool:
        """Whether the last token of an answer that is learned also holds characters behind it."""
        if answer.end_weight == draft.weight or answer.end == len(draft.text):
            return False
        stop = _first_token(spans, answer.end)
        return spans[stop - 1][1] > answer.end and not self._end(draft, answer, ids, spans)

    def _is_crossed(self, text: str, start: int, border: int, encoding: Any) -> bool:
        """Whether the text before a border has other tokens by itself, as a server feeds it; start is in front of it.

        Either a token holds characters of both sides, or the tokenizer treats blanks at the end of a text otherwise
        than between words.
        """
        if not 0 < border < len(text):
            return False
        if _is_inside_token(encoding, border):
            return True
        here, before = encoding.char_to_token(border), encoding.char_to_token(border - 1)
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


def _is_inside_token(encoding: Any, border: int) -> bool:
    """Whether a token holds characters of both sides of a border."""
    token = encoding.char_to_token(border)
    return token is not None and encoding.token_to_chars(token)[0] < border


def _take(example: Tokens) -> Encoded | DataError:
    wrong = [token for token in example.input_ids if not isinstance(token, int) or not 0 <= token < 2**31]
    if wrong:
        return DataError(f"input_ids should be ids of tokens, whole numbers from 0, not {wrong[0]!r}.")
    return Encoded([make_example(example.input_ids, example.weights)])
