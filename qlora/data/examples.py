"""What a row says, whatever its columns were."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class PartWeights:
    """The weights within one answer.

    Attributes:
        parts: Key of the turn, `content` or `reasoning_content`; first character in it and the one behind the last; and
            how much these count. Where the last part of the content ends the answer, the end token counts as it does.
        rest: How much everything else of the answer counts.
    """

    parts: list[tuple[str, int, int, float]]
    rest: float = 1.0

    @property
    def largest(self) -> float:
        """The largest weight: 0 if nothing of the answer is learned."""
        return max([self.rest, *(weight for *_, weight in self.parts)])


class JoinedParts(str):
    """A turn's content given in parts: their texts, joined by lines as servers do for templates that read text.

    Attributes:
        parts: The text of each part, for templates that read parts.
    """

    parts: tuple[str, ...]

    def __new__(cls, parts: Iterable[str]) -> Self:
        """Join the texts of parts."""
        parts = tuple(parts)
        joined = super().__new__(cls, "\n".join(parts))
        joined.parts = parts
        return joined

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.parts,)


def parts_of(content: str) -> tuple[str, ...]:
    """The texts of the parts that a turn's content was given in."""
    return content.parts if isinstance(content, JoinedParts) else (content,)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template.

    Attributes:
        messages: `{"role": …, "content": …}` each; see :class:`qlora.data.turns.TurnReader` for the other keys.
        tools: Tools that the assistant may call, described as templates read them.
        weights: Of each turn's loss, or None where all count alike.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    weights: Sequence[float | PartWeights] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text after raw text, without a template; an empty prompt is continued pretraining."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that are tokens already, with the weight of each one's loss."""

    input_ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two ways to go on from the same turns, the first one preferred."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class Rated:
    """A conversation whose last answer was found good or bad."""

    conversation: Conversation
    is_good: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text of a class."""

    text: str
    label: str


Example = Conversation | Completion | Tokens | Preference | Rated | Labelled
