"""Translation of what is learned: objectives other than supervised fine-tuning, and those without a counterpart."""

from dataclasses import dataclass, field
from typing import get_args

from qlora.config.convert import values
from qlora.config.convert.draft import OFF, Draft
from qlora.config.sections.objectives import PREFERENCE_DEFAULTS
from qlora.config.sections.train import TrainSection

OBJECTIVES = ", ".join(get_args(TrainSection.model_fields["objective"].annotation))

# Losses of a DPO trainer with a counterpart, by TRL's names: the objective, and whether it compares answers per token.
DPO_LOSSES = {"sigmoid": ("dpo", False), "sigmoid_norm": ("dpo", True), "ipo": ("ipo", True)}
# Objectives that TRL computes the loss of for axolotl, too.
AXOLOTL_OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto")
# LLaMA-Factory's values of `pref_loss` with a counterpart.
LLAMA_FACTORY_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


@dataclass(slots=True)
class Options:
    """Options of an objective, taken from another trainer's keys.

    Attributes:
        draft: Where they are taken from.
        values: Our options.
        given: Those that the other config sets, by the key that it sets them with.
    """

    draft: Draft
    values: dict[str, float | bool] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)

    def take(self, option: str, default: float, *names: str) -> None:
        """Add the first value that is a number, or the other trainer's default."""
        name, value = self.draft.take_named(*names)
        number = values.number(value)
        if number is not None:
            self.given[option] = name
        self.values[option] = default if number is None else number

    def set(self, objective: str, comment: str, has_dropout: bool = False) -> None:
        """Set the objective with its options, where they are given or differ from the defaults here."""
        draft, defaults = self.draft, PREFERENCE_DEFAULTS.get(objective, {"center": 0.0})
        kept = {name: value for name, value in self.values.items() if name in self.given or value != defaults[name]}
        draft.set("train.objective", objective, comment)
        draft.set("data.format", "kto" if objective == "kto" else "preference", comment)
        if kept:
            key = "train.reward" if objective == "reward" else "train.preference"
            draft.set(key, kept, ", ".join(self.given.values()) or f"{draft.trainer}'s defaults")
        if values.flag(draft.peek("sample_packing", "packing", "neat_packing")):
            draft.set("data.packing", False, f"{draft.trainer} does not pack rows of {objective}")
        if not has_dropout and values.flag(draft.take("disable_dropout")) is not False:
            draft.take("lora_dropout")
            draft.set("lora.dropout", 0.0, f"{draft.trainer} trains {objective} without dropout")

    def refuse(self, name: str) -> None:
        """Drop the key of an objective that is not available, and the options that were taken for it."""
        refuse_objective(self.draft, name)
        for taken in self.given.values():
            self.draft.drop(taken, "it is for an objective that is not available")


def refuse_objective(draft: Draft, name: str) -> None:
    """Drop the key of an objective that is not available, and warn what the rows can be used for."""
    draft.warn(
        f"{name}: {draft.peek(name)} asks for an objective that is not available; train.objective takes {OBJECTIVES}. "
        "It is left at sft, which refuses rows of preferences and ratings; to train on the chosen answers alone, set "
        "data.format: chosen."
    )
    draft.drop(name, "this objective is not available")


def translate_axolotl(draft: Draft) -> None:
    """Translate axolotl's `rl` and the options of TRL's trainers by axolotl's names."""
    if draft.peek("process_reward_model") not in OFF:
        refuse_objective(draft, "process_reward_model")
    if values.flag(draft.peek("reward_model")):
        draft.take("reward_model")
        set_reward(Options(draft), "reward_model")
    if draft.peek("rl") in OFF:
        return
    objective = str(draft.peek("rl")).lower()
    if objective not in AXOLOTL_OBJECTIVES:
        refuse_objective(draft, "rl")
        return
    comment, options = f"rl: {objective}", Options(draft)
    inside = values.number(values.mapping(draft.peek("trl")).get("beta"))
    options.take("beta", 0.1, "rl_beta", *(("orpo_alpha",) if objective == "orpo" else ()))
    if inside is not None:  # it has precedence there
        options.values["beta"], options.given["beta"] = inside, "trl.beta"
        draft.take("trl")
    if objective == "dpo":
        if not set_dpo(options, comment, "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing"):
            draft.drop("rl", "this loss is not available")
            return
    elif objective == "ipo":
        options.take("sft_weight", 0.0, "rpo_alpha")
        set_with_sft(options, "ipo", comment)
    elif objective == "simpo":
        options.take("gamma", 0.5, "simpo_gamma")
        options.take("sft_weight", 1.0, "cpo_alpha")
        set_with_sft(options, "simpo", comment)
    elif objective == "orpo":
        set_orpo(options, comment)
    else:
        set_kto(options, comment, "kto_desirable_weight", "kto_undesirable_weight")
    draft.take("rl")


def translate_llama_factory(draft: Draft) -> None:
    """Translate LLaMA-Factory's `stage` and its options, except `pt`, which is a format of rows here."""
    stage = str(draft.peek("stage") or "sft")
    if stage in ("sft", "pt"):
        draft.take("stage")
        return
    if stage == "rm":
        draft.take("stage")
        Options(draft).set("reward", "stage: rm", has_dropout=True)
        return
    if stage not in ("dpo", "kto"):
        refuse_objective(draft, "stage")
        return
    options, loss = Options(draft), str(draft.peek("pref_loss") or "sigmoid")
    if stage == "dpo" and loss not in LLAMA_FACTORY_LOSSES:
        refuse_objective(draft, "pref_loss")
        draft.drop("stage", "this loss is not available")
        return
    draft.take("stage")
    options.take("beta", 0.1, "pref_beta")
    if stage == "kto":
        name, ftx = draft.take_named("pref_ftx")
        if values.number(ftx):
            draft.drop(name, "kto has no sft_weight")
            draft.warn(f"{name}: {ftx} adds the loss of good answers, which is not available with kto.")
        set_kto(options, "stage: kto", "kto_chosen_weight", "kto_rejected_weight")
        objective = "kto"
    else:
        objective = LLAMA_FACTORY_LOSSES[loss]
        draft.take("pref_loss")
        options.take("sft_weight", 0.0, "pref_ftx")
        if objective == "orpo":  # it has the loss of the chosen answer already
            options.values["sft_weight"] += 1.0
        elif objective == "simpo":
            options.take("gamma", 0.5, "simpo_gamma")
        elif objective == "dpo":
            options.take("label_smoothing", 0.0, "dpo_label_smoothing")
        options.set(objective, f"stage: dpo, pref_loss: {loss}")
    is_further = draft.peek("adapter_name_or_path") not in OFF and not values.flag(draft.peek("create_new_adapter"))
    if is_further and objective in ("dpo", "ipo", "kto") and draft.peek("ref_model") in OFF:
        draft.warn(
            "The reference there is the base without the adapter of adapter_name_or_path. Here it is the model at step "
            "0, with that adapter."
        )


def set_dpo(options: Options, comment: str, losses_key: str, weights_key: str, smoothing: str) -> bool:
    """Set one of `DPO_LOSSES`, to which the loss of the chosen answers may be added; returns False if it is another.

    Args:
        options: Options, with beta.
        comment: Where the objective comes from.
        losses_key: The key with the names of losses that are added.
        weights_key: The key with their weights.
        smoothing: The key of label smoothing.
    """
    draft = options.draft
    losses = values.names(draft.peek(losses_key)) or ["sigmoid"]
    weights = [values.number(weight) for weight in values.names(draft.peek(weights_key)) or ["1"] * len(losses)]
    weight_of = dict(zip(losses, weights, strict=False))
    sft = weight_of.pop("sft", 0.0)
    main, factor = next(iter(weight_of.items()), ("", None))
    is_known = main in DPO_LOSSES and len(weight_of) + ("sft" in losses) == len(losses) == len(weights)
    if not is_known or len(weight_of) > 1 or sft is None or factor is None or factor <= 0:
        options.refuse(losses_key)
        return False
    draft.take(losses_key, weights_key)
    if draft.peek("f_divergence_type") == "reverse_kl":
        draft.take("f_divergence_type")
    objective, per_token = DPO_LOSSES[main]
    options.values["length_normalize"] = per_token
    if objective == "dpo":
        options.take("label_smoothing", 0.0, smoothing)
        if values.flag(draft.take("dpo_norm_loss")):
            options.values["length_normalize"] = True
            options.given["length_normalize"] = "dpo_norm_loss"
        if options.values["label_smoothing"]:
            draft.warn(
                f"{smoothing}: newer versions of TRL ignore it unless the loss is robust or exo_pair. Here it is in "
                "effect, as in older ones (conservative DPO)."
            )
    options.take("sft_weight", 0.0, "rpo_alpha")
    if sft:
        options.values["sft_weight"] += sft / factor
        options.given["sft_weight"] = losses_key
    if factor != 1:
        draft.warn(
            f"{weights_key}: the weight of {main} is {factor:g} there and 1 here, and sft_weight is relative to it. "
            "AdamW's steps don't depend on it, but clipping does (train.max_grad_norm)."
        )
    set_with_sft(options, objective, comment if main in ("sigmoid", *comment.split()) else f"{comment}, {main}")
    return True


def set_orpo(options: Options, comment: str) -> None:
    """Set ORPO with TRL's loss of the chosen answers."""
    options.draft.warn("TRL's ORPO also learns the prompts of the chosen answers; here only answers are learned.")
    options.set("orpo", comment)


def set_with_sft(options: Options, objective: str, comment: str) -> None:
    """Set an objective that may have the loss of the chosen answers as TRL computes it."""
    if options.values.get("sft_weight"):
        options.draft.warn(
            "sft_weight: TRL takes the mean over all tokens of the chosen answers of a micro-batch; here each answer "
            "counts the same, with the mean over its tokens."
        )
    options.set(objective, comment)


def set_reward(options: Options, comment: str) -> None:
    """Set a reward model with TRL's options."""
    options.draft.set("data.overlong", "drop", "TRL drops pairs with a text that is too long")
    options.take("center", 0.0, "center_rewards_coefficient")
    options.set("reward", comment)


def set_kto(options: Options, comment: str, good: str, bad: str) -> None:
    """Set KTO with the weights of good and bad answers."""
    options.take("desirable_weight", 1.0, good)
    options.take("undesirable_weight", 1.0, bad)
    options.set("kto", comment)
