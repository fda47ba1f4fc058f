"""Training objectives, one per file."""

from qlora.objectives.from_config import objective_from_section, release_loss, training_loss
from qlora.objectives.objective import Objective
from qlora.objectives.sft import SFT

__all__ = ["SFT", "Objective", "objective_from_section", "release_loss", "training_loss"]
