"""Training objectives, one per file."""

from qlora.objectives.classify import label_loss
from qlora.objectives.confusion import by_label
from qlora.objectives.from_config import (
    evaluation_loss,
    objective_for_data,
    objective_from_section,
    release_loss,
    training_loss,
)
from qlora.objectives.objective import Objective
from qlora.objectives.sft import SFT

__all__ = [
    "SFT",
    "Objective",
    "by_label",
    "evaluation_loss",
    "label_loss",
    "objective_for_data",
    "objective_from_section",
    "release_loss",
    "training_loss",
]
