"""GPUs by name: their memory, and the rates from which the time of a step is computed on paper."""

import re
from dataclasses import dataclass

from qlora.config.sections import parse_size

GIB = 1 << 30
# A smaller size is a number without its unit.
LEAST_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        name: Name of the product.
        memory: Bytes of memory.
        flops: Products per second of 16-bit numbers, summed in fp32, without sparsity; from the maker's data sheet.
        bus: Bytes per second between host and GPU in one direction; from the generation and width of PCIe.
    """

    name: str
    memory: int
    flops: float
    bus: float


# PCIe 4.0 with 8 lanes and with 16, and 5.0 with 16.
X8, X16, X16_5 = 15.75e9, 31.5e9, 63e9
CARDS = [
    Card("RTX 3060 12GB", 12 * GIB, 25.6e12, X16),
    Card("RTX 4060 Ti 16GB", 16 * GIB, 44.1e12, X8),
    Card("RTX 3090", 24 * GIB, 71e12, X16),
    Card("RTX 4090", 24 * GIB, 165.2e12, X16),
    Card("RTX 5090", 32 * GIB, 209.5e12, X16_5),
    Card("A100 80GB", 80 * GIB, 312e12, X16),
    Card("H100 80GB", 80 * GIB, 989e12, X16_5),
    Card("H200 141GB", 140 * GIB, 989e12, X16_5),
]


def find_card(text: str) -> Card | None:
    """Return the GPU that a text names, such as `4090`, `RTX 4090` or `4060Ti 16GB`; None for any other text."""
    asked = _letters(text)
    for card in CARDS:
        whole = _letters(card.name)
        without_size = _letters(re.sub(r"\d+GB", "", card.name))
        if asked in {name.removeprefix(prefix) for name in (whole, without_size) for prefix in ("", "RTX")}:
            return card
    return None


def read_gpu(text: str) -> tuple[int, Card | None]:
    """Return the bytes that a GPU's name or a size stands for, and the GPU if it is named.

    Raises:
        ValueError: The text is neither; a number without a unit that is no GPU's name is no size.
    """
    card = find_card(text)
    if card is not None:
        return card.memory, card
    names = ", ".join(card.name.removeprefix("RTX ") for card in CARDS)
    try:
        size = 0 if text.strip().replace(".", "", 1).isdigit() else parse_size(text)
    except ValueError:
        size = 0
    if size < LEAST_BYTES:
        raise ValueError(f"should be a size such as 24GB or 24GiB, or a GPU: {names}")
    return size, None


def _letters(text: str) -> str:
    return re.sub(r"[\s_-]", "", text.upper()).removeprefix("NVIDIA").removeprefix("GEFORCE")
