"""Translation of the objectives of TRL's trainers, which a file of arguments does not name."""

import re
from typing import Any

from qlora.config.convert import values
from qlora.config.convert.draft import Draft
from qlora.config.convert.objectives import (
    OBJECTIVES,
    Options,
    refuse_objective,
    set_dpo,
    set_kto,
    set_orpo,
    set_reward,
    set_with_sft,
)
from qlora.config.sections.objectives import PREFERENCE_DEFAULTS

# TRL's trainers by keys that only their arguments have.
TRL_KEYS = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "simpo": ("gamma_beta_ratio",),  # of SimPO's own trainer, which takes TRL's arguments
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "dpo": ("loss_weights", "rpo_alpha", "f_divergence_type", "ld_alpha", "use_weighting", "discopop_tau"),
    "grpo": ("num_generations", "reward_funcs"),
    "reward": ("center_rewards_coefficient",),
}
# The same by the losses that only they have. sigmoid, hinge and ipo are CPO's as well, which has cpo_alpha to tell.
TRL_LOSSES = {
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("simpo", "alphapo"),
    "dpo": ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
            "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
    "grpo": ("grpo", "dapo", "bnpo", "dr_grpo"),
}  # fmt: skip
# The same by words in commands and names of files, for those that have no keys of their own.
TRL_NAMES = re.compile(r"(?<![a-z])(sft|dpo|orpo|cpo|simpo|kto|reward|online_dpo|grpo|rloo|ppo|gkd|xpo|nash_md|bco|prm)"
                       r"(?![a-z])")  # fmt: skip
# Defaults of TRL's trainers other than SFT's.
TRL_LEARNING_RATE, TRL_LEARNING_RATES = 1e-6, {"reward": 1e-4}


def translate_trl(draft: Draft) -> dict[str, Any] | None:
    """Translate the arguments of one of TRL's trainers.

    Returns:
        The defaults of that trainer that differ from those of SFT's trainer; None if it is SFT's.
    """
    found = _trl_trainer(draft)
    if found is None and draft.peek("beta") is not None:
        given = draft.peek("beta")
        draft.warn(
            f"beta: {given} belongs to one of TRL's trainers of preferences, and the file does not say which. Set "
            f"train.objective ({', '.join(PREFERENCE_DEFAULTS)}) and train.preference: {{beta: {given}}}."
        )
        draft.drop("beta", "the file does not say which objective it is for")
        return {"train.learning_rate": TRL_LEARNING_RATE}
    trainer, evidence = found or ("sft", "")
    if trainer == "sft":
        return None
    options = Options(draft)
    loss = draft.peek("loss_type")
    if trainer == "dpo":
        options.take("beta", 0.1, "beta")
        set_dpo(options, evidence, "loss_type", "loss_weights", "label_smoothing")
    elif trainer == "cpo" or trainer == "simpo" and loss in TRL_LOSSES["cpo"]:
        _translate_cpo(options, evidence, "sigmoid" if loss is None else str(loss))
    elif trainer == "simpo":
        _translate_simpo(options, evidence)
    elif trainer == "orpo":
        options.take("beta", 0.1, "beta")
        set_orpo(options, evidence)
    elif trainer == "kto" and loss in (None, "kto"):
        draft.take("loss_type")
        options.take("beta", 0.1, "beta")
        set_kto(options, evidence, "desirable_weight", "undesirable_weight")
    elif trainer == "kto":
        refuse_objective(draft, "loss_type")
    elif trainer == "reward":
        set_reward(options, evidence)
    else:
        draft.warn(
            f"TRL's objective {trainer} ({evidence}) is not available; train.objective takes {OBJECTIVES}. It is left "
            "at sft."
        )
    return {"train.learning_rate": TRL_LEARNING_RATES.get(trainer, TRL_LEARNING_RATE)}


def _trl_trainer(draft: Draft) -> tuple[str, str] | None:
    """Return which of TRL's trainers the arguments are for and what tells it; None if nothing does."""
    if named := TRL_NAMES.findall(draft.program.lower()):
        return named[-1], f"the command {draft.program}"
    for trainer, keys in TRL_KEYS.items():
        for key in keys:
            if draft.peek(key) is not None:
                return trainer, key
    is_preference = draft.peek("beta", "max_prompt_length", "loss_type") is not None
    for name in draft.names if is_preference else draft.names[:1]:
        if named := TRL_NAMES.findall(name.lower()):
            return named[-1], f"the file's name, {name}"
    for loss in values.names(draft.peek("loss_type")):
        for trainer, losses in TRL_LOSSES.items():
            if loss in losses:
                return trainer, f"loss_type: {loss}"
    return None


def _translate_cpo(options: Options, comment: str, loss: str) -> None:
    """Set CPO or SimPO from the arguments of TRL's CPO trainer, which has both."""
    draft = options.draft
    shape = "alpha" if values.number(draft.peek("alpha")) else ""
    if shape or loss not in ("sigmoid", "simpo", "alphapo"):
        options.refuse(shape or "loss_type")
        return
    draft.take("loss_type")
    options.take("beta", 0.1, "beta")
    options.take("label_smoothing", 0.0, "label_smoothing")
    options.take("sft_weight", 1.0, "cpo_alpha")
    if loss == "alphapo":  # with alpha: 0 it is SimPO alone
        options.values["sft_weight"] = 0.0
    if loss != "sigmoid":
        options.take("gamma", 0.5, "simpo_gamma")
    set_with_sft(options, "cpo" if loss == "sigmoid" else "simpo", f"{comment}, loss_type: {loss}")


def _translate_simpo(options: Options, comment: str) -> None:
    """Set SimPO from the arguments of its authors' trainer, in which gamma is relative to beta."""
    draft = options.draft
    if draft.peek("loss_type") not in (None, "sigmoid"):
        refuse_objective(draft, "loss_type")
        return
    draft.take("loss_type")
    options.take("beta", 2.0, "beta")
    options.take("gamma", 0.25, "gamma_beta_ratio")
    options.values["gamma"] *= options.values["beta"]
    options.take("sft_weight", 0.0, "sft_weight")
    options.take("label_smoothing", 0.0, "label_smoothing")
    set_with_sft(options, "simpo", comment)
