"""Training objectives, one per file."""

from qlora.objectives.confusion import by_label, matrix_of
from qlora.objectives.from_config import objective_for_data, objective_from_section, training_loss
from qlora.objectives.objective import Objective
from qlora.objectives.sft import SFT

__all__ = ["SFT", "Objective", "by_label", "matrix_of", "objective_for_data", "objective_from_section", "training_loss"]
