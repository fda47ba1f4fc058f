"""Examples: the content of a row, independent of its columns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class PartWeights:
    """The weights within one answer.

    Attributes:
        parts: For each part the turn's key that it is in, `content` or `reasoning_content`, its first character, the
            one after its last, and its weight. If the last part of the content ends the answer, the end token has the
            weight of this part.
        rest: Weight of everything else in the answer.
    """

    parts: list[tuple[str, int, int, float]]
    rest: float = 1.0

    @property
    def max_weight(self) -> float:
        """Largest weight: 0 if nothing of the answer is supervised."""
        return max([self.rest, *(weight for *_, weight in self.parts)])


class JoinedParts(str):
    """A turn's content given in parts, joined with line breaks as servers do for templates that read text.

    Attributes:
        parts: Text of each part, for templates that read parts.
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
    """Return the texts of the parts that a turn's content was given in."""
    return content.parts if isinstance(content, JoinedParts) else (content,)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation for a chat template.

    Attributes:
        messages: One `{"role": …, "content": …}` per turn; :class:`qlora.data.turns.TurnReader` lists the other keys.
        tools: Descriptions of tools that the assistant may call, in the form that templates read.
        weights: Weight of each turn's loss, or None if all are equal.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    weights: Sequence[float | PartWeights] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Text that completes a prompt, without a template; for continued pretraining the prompt is empty."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, with the weight of each token's loss."""

    input_ids: list[int]
    weights: list[float]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of the same turns, of which the first is preferred.

    Attributes:
        chosen: The preferred one.
        rejected: The other one.
        margin: By how much the reward of the first should be above that of the second, for reward models.
    """

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Rated:
    """A conversation whose last answer was rated good or bad."""

    conversation: Conversation
    is_good: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its labels.

    Attributes:
        text: The text.
        labels: Names of its labels.
        is_list: Whether the row has a list of labels, of any length, instead of one.
    """

    text: str
    labels: tuple[str, ...]
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image with its labels.

    Attributes:
        image: Its file, or the content of one.
        labels: Names of its labels.
        is_list: Whether the row has a list of labels, of any length, instead of one.
    """

    image: Path | bytes
    labels: tuple[str, ...]
    is_list: bool = False


Example = Conversation | Completion | Tokens | Preference | Rated | Labelled | LabelledImage
