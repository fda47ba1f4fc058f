"""Tokens and weights of a document from its draft and the encoding of its text."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from qlora.data.drafts import Answer, Draft
from qlora.data.serving import TemplateFacts
from qlora.data.tokens import TokenizedExample, make_example

# Prefixes for a text that continues another, removed again after tokenizing: the first that does not merge is used.
PREFIXES = ("a", "\n", ".", "0")

# Number of tokens before the blanks in front of a border that are compared with those of the text before it alone.
NUM_COMPARED = 2

# First character of each token, and the one after its last.
Spans = Sequence[tuple[int, int]]


class DraftTokenizer:
    """Turns drafts into tokens with weights.

    Args:
        tokenizer: A fast tokenizer of transformers, with an EOS token.
        facts: Facts about its chat template.
    """

    def __init__(self, tokenizer: Any, facts: TemplateFacts) -> None:
        self._tokenizer = tokenizer
        # A token that starts texts ends none, unless it does both.
        self._end_ids = facts.special_ids - ({tokenizer.bos_token_id} - {tokenizer.eos_token_id})

    def encode(self, texts: list[str]) -> list[Any]:
        """Tokenize texts with the `tokenizers` backend, since transformers would convert every field to lists."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend.encode_batch(texts, add_special_tokens=False)

    def documents(self, draft: Draft, encoding: Any) -> list[tuple[TokenizedExample, bool]]:
        """Build the documents of a draft.

        Args:
            draft: The draft.
            encoding: Encoding of its text, see :meth:`encode`.

        Returns:
            Each document, with whether EOS was added because its answer has no end token.
        """
        spans: Spans = _Spans(encoding)
        ids = encoding.ids
        borders = [answer.begin for answer in draft.answers]
        stretches = pairwise([0, *borders])
        crossed = [border for start, border in stretches if self._is_crossed(draft.text, start, border, encoding)]
        for answer in draft.answers:
            crossed += [border for border in answer.part_borders if _is_inside_token(encoding, border)]
            crossed += [answer.end] * self._is_end_crossed(draft, answer, ids, spans)
        is_endless = any(self._lacks_end(draft, answer, ids, spans) for answer in draft.answers[:-1])
        if not draft.weight and (is_endless or crossed and min(crossed) < borders[-1]):
            # A server tokenizes the whole prompt of a later answer: it merges tokens across the borders of an earlier
            # answer, and feeds no EOS that would have to be added to it.
            parts = draft.by_answer()
            encodings = self.encode([part.text for part in parts])
            return [pair for part, own in zip(parts, encodings, strict=True) for pair in self.documents(part, own)]
        if crossed:
            ids, spans = self._tokens_by_pieces(draft.text, crossed)
        weights, has_end = self._weights(draft, ids, spans)
        # A text may already contain its first and last token.
        starts = [] if ids[: len(draft.starts)] == draft.starts else draft.starts
        has_end = has_end or not draft.is_chat and ids[-1:] == [self._tokenizer.eos_token_id]
        last = [draft.answers[-1].end_weight] if draft.needs_end and not has_end else []
        ids = [*starts, *ids, *[self._tokenizer.eos_token_id] * len(last)]
        if starts or last:
            weights = np.concatenate([[0.0] * len(starts), weights, last])
        return [(make_example(ids, weights), draft.is_chat and bool(last))]

    def _weights(self, draft: Draft, ids: list[int], spans: Spans) -> tuple[np.ndarray, bool]:
        """Return the weight of each token, and whether the last answer ends with an end token."""
        weights = np.full(len(ids), draft.weight, dtype=np.float16)
        ends = range(0)
        for answer in draft.answers:
            first, stop = _first_token(spans, answer.begin), _first_token(spans, answer.end)
            ends = self._end(draft, answer, ids, spans) if draft.is_chat else range(stop, stop)
            # What a template writes after a turn's end token is not supervised: every server has stopped there.
            weights[first : ends.stop] = answer.weight
            if answer.parts:
                weights[first : ends.stop] = answer.token_weights(spans[place] for place in range(first, ends.stop))
            # An end token within an answer's text would teach the model to stop there.
            ending = {*ids[ends.start : ends.stop], self._tokenizer.eos_token_id}
            written = [_first_token(spans, place) for place in answer.control_tokens]
            weights[[place for place in written if place < ends.start and ids[place] in ending]] = 0
        return weights, len(ends) > 0

    def _end(self, draft: Draft, answer: Answer, ids: list[int], spans: Spans) -> range:
        """Return the tokens that end an answer; an empty range after its last token if there are none.

        This is the first special token after the answer's text, or all up to EOS if only special tokens, such as those
        that close a tag, stand between the two.
        """
        first, stop = _first_token(spans, answer.begin), _first_token(spans, answer.end)
        if answer.text_end is None:
            # The last special token that no text follows: earlier ones may be tags around a call.
            places = range(stop - 1, first - 1, -1)
        else:
            places = range(_first_token(spans, answer.text_end), stop)
        end = next((place for place in places if ids[place] in self._end_ids), None)
        if end is not None and answer.text_end is None and draft.text[spans[end][1] : answer.end].strip():
            end = None
        # In data made for other trainers the text may end with an end token of its own, which then takes precedence.
        eos = self._tokenizer.eos_token_id
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
        """Return whether an answer whose end is supervised has no end token."""
        return answer.end_weight > 0 and not self._end(draft, answer, ids, spans)

    def _is_end_crossed(self, draft: Draft, answer: Answer, ids: list[int], spans: Spans) -> bool:
        """Return whether the last token of a supervised answer also holds characters after it."""
        if answer.end_weight == draft.weight or answer.end == len(draft.text):
            return False
        stop = _first_token(spans, answer.end)
        return spans[stop - 1][1] > answer.end and not self._end(draft, answer, ids, spans)

    def _is_crossed(self, text: str, start: int, border: int, encoding: Any) -> bool:
        """Return whether the text before a border has other tokens on its own, as a server feeds it.

        Either a token holds characters of both sides, or the tokenizer treats blanks at the end of a text differently
        than between words.

        Args:
            text: The whole text.
            start: Start of the stretch before the border that is tokenized on its own.
            border: The first character after the border.
            encoding: Encoding of the whole text.
        """
        if not 0 < border < len(text):
            return False
        if _is_inside_token(encoding, border):
            return True
        here, before = encoding.char_to_token(border), encoding.char_to_token(border - 1)
        blanks = len(text[start:border]) - len(text[start:border].rstrip())
        # Byte-level tokenizers may leave blanks out of a token's span.
        if here is not None and before is not None and encoding.token_to_chars(before)[0] <= border - blanks:
            return False
        alone = self.encode([text[start:border]])[0].ids
        whole = encoding.ids[: _first_token(_Spans(encoding), border)]
        count = blanks + NUM_COMPARED  # the blanks are at most as many tokens
        return alone[-count:] != whole[-count:][-len(alone) :]

    def _tokens_by_pieces(self, text: str, borders: Sequence[int]) -> tuple[list[int], Spans]:
        """Tokenize a text in pieces between borders, so that no token crosses one; return ids and spans.

        A server that is given a prompt never sees a token that also holds the first characters of the answer.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for begin, end in pairwise(sorted({0, *borders, len(text)})):
            piece_ids, piece_spans = self._encode_piece(text[begin:end], continues=begin > 0)
            ids += piece_ids
            spans += [(begin + first, begin + last) for first, last in piece_spans]
        return ids, spans

    def _encode_piece(self, text: str, continues: bool = False) -> tuple[list[int], Spans]:
        """Return ids and spans of a text; a text that continues another gets no marker of a text's beginning."""
        for prefix in PREFIXES if continues else ("",):
            (encoding,) = self.encode([prefix + text])
            skipped = self.encode([prefix])[0].ids if prefix else []
            if encoding.ids[: len(skipped)] == skipped:
                spans = [
                    (max(0, begin - len(prefix)), end - len(prefix)) for begin, end in encoding.offsets[len(skipped) :]
                ]
                return encoding.ids[len(skipped) :], spans
        return self._encode_piece(text)


class _Spans(Sequence[tuple[int, int]]):
    """Spans of an encoding, computed on access since few are needed."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self._encoding)

    def __getitem__(self, token: Any) -> Any:
        return self._encoding.token_to_chars(token)


def _first_token(spans: Spans, char: int) -> int:
    """Return the first token that begins at a character or after it."""
    # Searched by their ends: a token whose span leaves out blanks seems to begin after them.
    token = bisect_right(spans, char, key=itemgetter(1))
    return token + (token < len(spans) and spans[token][0] < char)


def _is_inside_token(encoding: Any, border: int) -> bool:
    """Return whether a token holds characters of both sides of a border."""
    token = encoding.char_to_token(border)
    return token is not None and encoding.token_to_chars(token)[0] < border
