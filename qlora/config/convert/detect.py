"""Detection of the trainer that a config is for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config.convert import axolotl, llama_factory, trl, unsloth
from qlora.config.convert.draft import Draft

# Number of a trainer's own keys from which a config is taken for one of its configs.
LEAST_MARKS = 2


@dataclass(frozen=True, slots=True)
class Trainer:
    """A trainer whose configs can be converted.

    Attributes:
        name: Name as its project writes it.
        marks: Keys by which its configs are recognized, which no other trainer has.
        translate: Takes a draft of its values and the config's folder.
        normalize: Rewrites keys that can be written in several ways.
        programs: Parts of the commands that start it.
    """

    name: str
    marks: set[str]
    translate: Callable[[Draft, Path], None]
    normalize: Callable[[dict[str, Any]], dict[str, Any]] = dict
    programs: tuple[str, ...] = ()


TRAINERS = (
    Trainer("axolotl", axolotl.MARKS, axolotl.translate),
    Trainer("LLaMA-Factory", llama_factory.MARKS, llama_factory.translate, programs=("llamafactory", "src/train")),
    Trainer("unsloth", unsloth.MARKS, unsloth.translate, unsloth.normalize, ("unsloth",)),
    # Last: the others take transformers' arguments, too.
    Trainer("TRL", trl.MARKS, trl.translate, trl.normalize),
)


def detect(values: Mapping[str, Any], program: str = "") -> tuple[Trainer, dict[str, Any]] | None:
    """Return the trainer whose config has these values, with the values as it reads them; None if it is unknown.

    Args:
        values: Keys and values.
        program: Start of the command that they were given to, empty for a file.
    """
    *special, general = [(trainer, trainer.normalize(dict(values))) for trainer in TRAINERS]
    for trainer, normalized in special:
        if any(part in program for part in trainer.programs):
            return trainer, normalized
    best = max(special, key=_count_marks)
    return next((one for one in (best, general) if _count_marks(one) >= LEAST_MARKS), None)


def _count_marks(one: tuple[Trainer, dict[str, Any]]) -> int:
    trainer, values = one
    return len(trainer.marks & values.keys())
