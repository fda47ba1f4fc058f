"""Examples decoded into pieces of text that show what is supervised."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qlora.data.tokens import TokenizedExample


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens of one kind.

    Attributes:
        text: Its text, decoded in context.
        weight: Weight of the loss of each of its tokens; 0 if they are not supervised.
        is_special: Whether it is a control token.
    """

    text: str
    weight: float
    is_special: bool


def split_shared(first: Sequence[Piece], second: Sequence[Piece]) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """Return the unsupervised pieces that two documents begin with, such as a prompt, and what follows in each."""
    pairs = enumerate(zip(first, second, strict=False))
    common = next((place for place, (one, other) in pairs if one != other or one.weight), min(len(first), len(second)))
    return list(first[:common]), list(first[common:]), list(second[common:])


def pieces(tokenizer: Any, example: TokenizedExample) -> list[Piece]:
    """Cut an example where the weight changes, and around every control token."""
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids, weights = example.input_ids.tolist(), example.weights.tolist()

    def kind(place: int) -> tuple[float, bool, int]:
        is_special = ids[place] in special
        return weights[place], is_special, place if is_special else -1

    cut, before = [], ""
    for (weight, is_special, _), places in groupby(range(len(ids)), key=kind):
        # Decode everything so far, since a piece on its own may lose its leading space.
        end = max(places) + 1
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if end < len(ids):
            text = text.rstrip("\ufffd")  # a character that the next token completes
        cut.append(Piece(text[len(before) :], weight, is_special))
        before = text
    return cut
