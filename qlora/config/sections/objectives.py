"""Sections inside `train`: options of objectives, and terms and passes that are added to their loss."""

from pydantic import Field, model_validator

from qlora.config.sections.base import Section
from qlora.config.sections.values import PathText

# Of objectives of preferences: higher rates soon make all answers less likely (docs/preferences.md).
PREFERENCE_LEARNING_RATE = 5e-6


class AdversarialSection(Section):
    """Adversarial training: a second pass of every step on perturbed embeddings (FGM, one step of FreeLB)."""

    epsilon: float = Field(
        gt=0,
        description="Length of each token's perturbation, in the direction of the loss's gradient, in the units of the "
        "embedded tokens.",
        examples=[0.05],
    )


class KeepSection(Section):
    """What keeps the model close to its base while it learns something new."""

    kl: float = Field(
        default=0.0,
        ge=0,
        description="Factor of KL(base ‖ model) per supervised token of the current batch, which is added to the loss; "
        "for objectives of pairs and ratings, the mean over each answer's tokens. The base is the model without its "
        "adapter.",
        examples=[0.1],
    )
    null_space: PathText | None = Field(
        default=None,
        description="File with rows of an older task: the adapter does not see the main directions of the inputs that "
        "layers get from them.",
        examples=["data/old-task.jsonl"],
    )

    @model_validator(mode="after")
    def _check_any(self) -> "KeepSection":
        if not self.kl and self.null_space is None:
            raise ValueError("keeps nothing; set kl or null_space, or remove keep")
        return self


class PreferenceSection(Section):
    """Options of objectives that learn from preferences; null is the objective's own default."""

    beta: float | None = Field(
        default=None,
        gt=0,
        description="Factor on the log-probabilities that are compared, for dpo and kto relative to the model at step "
        "0: a larger one allows less change. For orpo the factor on the odds ratio's loss. null is 2.0 for simpo, else "
        "0.1.",
        examples=[0.2],
    )
    label_smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=0.5,
        description="Share of the preferences that are assumed to be reversed (dpo, simpo, cpo); null is 0.",
        examples=[0.1],
    )
    sft_weight: float | None = Field(
        default=None,
        ge=0,
        description="Factor on the mean negative log-probability of the chosen answer's tokens, which is added to the "
        "loss. null is 1.0 for orpo and cpo, else 0.",
        examples=[1.0],
    )
    gamma: float | None = Field(
        default=None,
        ge=0,
        description="Margin by which the chosen answer's reward should be larger (simpo); null is 1.0.",
        examples=[0.5],
    )
    length_normalize: bool | None = Field(
        default=None,
        description="Compare log-probabilities per token instead of per answer (dpo, ipo, simpo, cpo). null is true "
        "for ipo and simpo, else false.",
        examples=[True],
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Factor on the loss of good answers (kto); null is 1.0.",
        examples=[1.33],
    )
    undesirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Factor on the loss of bad answers (kto); null is 1.0.",
        examples=[1.33],
    )


# Defaults of the options that each preference objective has.
PREFERENCE_DEFAULTS: dict[str, dict[str, float | bool]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalize": False},
    "ipo": {"beta": 0.1, "sft_weight": 0.0, "length_normalize": True},
    "orpo": {"beta": 0.1, "sft_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0, "sft_weight": 0.0, "length_normalize": True},
    "cpo": {"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 1.0, "length_normalize": False},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}


class RewardSection(Section):
    """Options of reward models."""

    center: float = Field(
        default=0.0,
        ge=0,
        description="Factor of the mean of (chosen + rejected reward)², which is added to the loss and keeps rewards "
        "around zero.",
        examples=[0.01],
    )
