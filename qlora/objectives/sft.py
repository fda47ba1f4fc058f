"""Supervised fine-tuning: the weighted cross-entropy of the supervised tokens."""

from qlora.data.formats import FORMATS
from qlora.model import SUPERVISED
from qlora.objectives.objective import Objective

# How to train on the answers of rows that were written for another objective.
REMEDIES = {
    "preference": "set data.format: chosen; to learn the preference, set train.objective: dpo",
    "kto": "remove the rows whose label is false, and set data.format to messages, alpaca or completion; to learn from "
    "both, set train.objective: kto",
    "classification": "set data.format: text; to learn the labels, set train.objective: classify",
}
SFT = Objective(
    name="sft",
    loss=SUPERVISED,
    formats=frozenset(FORMATS) - REMEDIES.keys(),
    remedies={format: f"to train on their answers, {remedy}" for format, remedy in REMEDIES.items()},
)
