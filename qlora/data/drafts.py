"""Drafts: the text of a document before it is tokenized, with the places and weights of its answers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's place in a text, in characters.

    Attributes:
        begin: First character, after the prompt.
        text_end: End of the answer's own text, after which its end token follows; None if it is unknown.
        end: End of everything that the template writes for the answer.
        weight: Weight of its tokens.
        parts: First character, the one after the last, and weight of parts with a weight of their own.
        control_tokens: First characters of the control tokens that come from its data.
    """

    begin: int
    text_end: int | None
    end: int
    weight: float
    parts: Sequence[tuple[int, int, float]] = ()
    control_tokens: frozenset[int] = frozenset()

    def token_weights(self, spans: Iterable[tuple[int, int]]) -> list[float]:
        """Return the weight of each token, given their spans: the smallest weight of a token's characters."""
        characters = np.full(self.end - self.begin, self.weight)
        for begin, end, weight in self.parts:
            characters[begin - self.begin : end - self.begin] = weight
        places = ((begin - self.begin, max(end, begin + 1) - self.begin) for begin, end in spans)
        return [float(characters[begin:end].min()) for begin, end in places]

    @property
    def part_borders(self) -> list[int]:
        """Characters inside the answer at which a part begins or ends."""
        return sorted({place for begin, end, _ in self.parts for place in (begin, end)} - {self.begin, self.end})

    @property
    def max_weight(self) -> float:
        """Largest weight in the answer: 0 if none of it is supervised."""
        return max([self.weight, *(weight for *_, weight in self.parts)])

    @property
    def end_weight(self) -> float:
        """Weight of the answer's end token."""
        return next((weight for _, end, weight in reversed(self.parts) if end == self.end), self.weight)


@dataclass(slots=True)
class Draft:
    """A document before its text is tokenized.

    Attributes:
        text: The whole text.
        answers: Answers in the text whose weights differ from `weight`.
        weight: Weight of everything outside its answers.
        is_chat: Whether its answers end with an end token of their template.
        needs_end: Whether its last answer is supervised, so that EOS is added if it has no end token.
        starts: Ids to put in front.
        switched: Number of answers by the switch of the template that their prompt needs, such as
            `enable_thinking=false`.
    """

    text: str
    answers: list[Answer]
    weight: float
    is_chat: bool = True
    needs_end: bool = False
    starts: list[int] = field(default_factory=list)
    switched: Counter[str] = field(default_factory=Counter)

    def by_answer(self) -> "list[Draft]":
        """Return a draft for each supervised answer that ends with this answer."""
        return [Draft(self.text[: one.end], [one], 0.0, needs_end=True) for one in self.answers if one.max_weight]
