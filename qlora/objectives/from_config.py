"""The objectives by name, the one that a config names, and what the config adds to its loss."""

from collections.abc import Callable, Mapping
from functools import partial

from qlora.config import TrainSection
from qlora.data import Datasets, Labels
from qlora.model import Loss, token_loss
from qlora.objectives.adversarial import with_adversary
from qlora.objectives.classify import classify_objective, label_loss, with_labels
from qlora.objectives.keep import with_base_kl
from qlora.objectives.kto import kto_objective
from qlora.objectives.neftune import with_noise
from qlora.objectives.objective import Objective
from qlora.objectives.preference import KINDS, preference_objective
from qlora.objectives.reward import reward_objective
from qlora.objectives.sft import SFT


def _preference(name: str, section: TrainSection) -> Objective:
    assert section.preference is not None, "the config fills it in"
    return preference_objective(name, section.preference)


def _kto(section: TrainSection) -> Objective:
    assert section.preference is not None, "the config fills it in"
    return kto_objective(section.preference)


def _reward(section: TrainSection) -> Objective:
    return reward_objective(0.0 if section.reward is None else section.reward.center)


def _classify(section: TrainSection) -> Objective:
    assert section.classify_by is not None, "the config fills it in"
    return classify_objective(section.classify_by)


_OBJECTIVES: Mapping[str, Callable[[TrainSection], Objective]] = {
    "sft": lambda _section: SFT,
    **{name: partial(_preference, name) for name in KINDS},
    "kto": _kto,
    "reward": _reward,
    "classify": _classify,
}


def objective_from_section(section: TrainSection) -> Objective:
    """Return the objective that a config's train section names; its loss is the one that evaluations report."""
    return _OBJECTIVES[section.objective](section)


def objective_for_data(section: TrainSection, datasets: Datasets) -> Objective:
    """Return the objective that a section names, for its data: with their labels, if it learns any.

    Raises:
        ConfigError: The section does not fit the data.
    """
    objective = objective_from_section(section)
    if datasets.labels is None:
        return objective
    return with_labels(objective, datasets, section.class_weights)


def evaluation_loss(section: TrainSection, labels: Labels | None) -> Loss:
    """Return the loss that evaluations report, with its head of scores if there is one.

    Args:
        section: Section of the config.
        labels: Labels that it learns; None if it learns none. Without the tokens of their answers, there are no metrics
            of a classification by words.
    """
    return objective_from_section(section).loss if labels is None else label_loss(labels)


def release_loss(section: TrainSection, labels: Labels | None) -> Loss:
    """Return the loss that merged models are compared by: the objective's, or one that needs no model at step 0."""
    return objective_from_section(section).judge or evaluation_loss(section, labels)


def training_loss(section: TrainSection, loss: Loss | None = None) -> Loss:
    """Return the loss that a run is trained with: the objective's, with what the config adds while training.

    A token loss other than the plain cross-entropy takes the place of the objective's loss; the config allows it only
    where that is the cross-entropy of supervised tokens. All additions combine. The divergence of `train.keep` is part
    of the loss that `train.adversarial` perturbs and computes twice; the noise of `train.neftune_alpha` is the same in
    both passes. The base that `train.keep` compares with sees neither noise nor perturbation.

    Args:
        section: Section of the config.
        loss: Loss of the objective; default: that of the objective that the section names.
    """
    loss = objective_from_section(section).loss if loss is None else loss
    if section.token_loss != "ce" or section.label_smoothing:
        loss = token_loss(section.label_smoothing, by_probability=section.token_loss == "dft")
    if section.keep is not None and section.keep.kl:
        loss = with_base_kl(loss, section.keep.kl)
    if section.neftune_alpha is not None:
        loss = with_noise(loss, section.neftune_alpha)
    if section.adversarial is not None:
        loss = with_adversary(loss, section.adversarial.epsilon)
    return loss
