"""The objectives by name, the one that a config names, and what the config adds to its loss."""

from collections.abc import Callable, Mapping
from functools import partial

from qlora.config import TrainSection
from qlora.model import Loss
from qlora.objectives.adversarial import with_adversary
from qlora.objectives.keep import with_base_kl
from qlora.objectives.kto import kto_objective
from qlora.objectives.neftune import with_noise
from qlora.objectives.objective import Objective
from qlora.objectives.preference import KINDS, preference_objective
from qlora.objectives.sft import SFT


def _preference(name: str, section: TrainSection) -> Objective:
    assert section.preference is not None, "the config fills it in"
    return preference_objective(name, section.preference)


def _kto(section: TrainSection) -> Objective:
    assert section.preference is not None, "the config fills it in"
    return kto_objective(section.preference)


_OBJECTIVES: Mapping[str, Callable[[TrainSection], Objective]] = {
    "sft": lambda _section: SFT,
    **{name: partial(_preference, name) for name in KINDS},
    "kto": _kto,
}


def objective_from_section(section: TrainSection) -> Objective:
    """Return the objective that a config's train section names; its loss is the one that evaluations report."""
    return _OBJECTIVES[section.objective](section)


def training_loss(section: TrainSection, loss: Loss | None = None) -> Loss:
    """Return the loss that a run is trained with: the objective's, with what the config adds while training.

    All additions combine. The divergence of `train.keep` is part of the loss that `train.adversarial` perturbs and
    computes twice; the noise of `train.neftune_alpha` is the same in both passes. The base that `train.keep` compares
    with sees neither noise nor perturbation.

    Args:
        section: Section of the config.
        loss: Loss of the objective; default: that of the objective that the section names.
    """
    loss = objective_from_section(section).loss if loss is None else loss
    if section.keep is not None and section.keep.kl:
        loss = with_base_kl(loss, section.keep.kl)
    if section.neftune_alpha is not None:
        loss = with_noise(loss, section.neftune_alpha)
    if section.adversarial is not None:
        loss = with_adversary(loss, section.adversarial.epsilon)
    return loss
