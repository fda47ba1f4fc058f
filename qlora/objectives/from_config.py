"""The objectives by name, and the one that a config names."""

from qlora.config import TrainSection
from qlora.objectives.objective import Objective
from qlora.objectives.sft import SFT


def objective_from_section(section: TrainSection) -> Objective:
    """Return the objective that a config's train section names."""
    objectives = {"sft": SFT}
    return objectives[section.objective]
