"""The objectives by name, the one that a config names, and what the config adds to its loss."""

from qlora.config import TrainSection
from qlora.model import Loss
from qlora.objectives.adversarial import with_adversary
from qlora.objectives.neftune import with_noise
from qlora.objectives.objective import Objective
from qlora.objectives.sft import SFT


def objective_from_section(section: TrainSection) -> Objective:
    """Return the objective that a config's train section names; its loss is the one that evaluations report."""
    objectives = {"sft": SFT}
    return objectives[section.objective]


def training_loss(section: TrainSection, loss: Loss | None = None) -> Loss:
    """Return the loss that a run is trained with: the objective's, with what the config adds while training.

    All additions combine. The noise of `train.neftune_alpha` is on the embeddings of every pass that is trained, and
    the same in both passes of `train.adversarial`, which perturbs the sum of all losses.

    Args:
        section: Section of the config.
        loss: Loss of the objective; default: that of the objective that the section names.
    """
    loss = objective_from_section(section).loss if loss is None else loss
    if section.neftune_alpha is not None:
        loss = with_noise(loss, section.neftune_alpha)
    if section.adversarial is not None:
        loss = with_adversary(loss, section.adversarial.epsilon)
    return loss
