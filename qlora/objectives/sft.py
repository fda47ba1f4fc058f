"""Supervised fine-tuning: the weighted cross-entropy of the supervised tokens."""

from qlora.data.formats import FORMATS
from qlora.model import SUPERVISED
from qlora.objectives.objective import Objective

# How to learn the answers of rows that were written for another objective.
REMEDIES = {
    "preference": "set data.format: chosen",
    "kto": "take out the rows whose label is false, and set data.format to messages, alpaca or completion",
    "classification": "set data.format: text",
}
SFT = Objective(
    name="sft",
    loss=SUPERVISED,
    formats=frozenset(FORMATS) - REMEDIES.keys(),
    remedies={format: f"to learn their answers alone, {remedy}" for format, remedy in REMEDIES.items()},
)
