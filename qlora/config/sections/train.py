"""The section `train`: the run."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from qlora.config.sections.base import Section
from qlora.config.sections.evaluation import EarlyStoppingSection, SamplesSection
from qlora.config.sections.objectives import (
    PREFERENCE_DEFAULTS,
    PREFERENCE_LEARNING_RATE,
    AdversarialSection,
    KeepSection,
    PreferenceSection,
    RewardSection,
)
from qlora.config.sections.values import (
    ClassWeights,
    Count,
    GroupRate,
    Names,
    OpenShare,
    PathText,
    RateOrAuto,
    Share,
    ShareOrSteps,
    rate_factor,
)

DEFAULT_LEARNING_RATE = 2e-4
DEFAULT_WARMUP_RATIO = 0.03
# Objectives whose loss is the cross-entropy of supervised tokens.
TOKEN_LOSS_OBJECTIVES = ("sft",)
# Groups of parameters that can have a learning rate of their own.
RATE_GROUPS = ("lora_A", "lora_B", "embeddings", "magnitude", "score")
# Objectives that always train a head of scores for whole texts.
SCORING = ("reward",)
# Keys of a single scheduler: its name, and the key's value where it is null.
SCHEDULER_OPTIONS: dict[str, tuple[str, float]] = {"decay_ratio": ("wsd", 0.2), "restarts": ("cosine_restarts", 1)}


class TrainSection(Section):
    """The run."""

    objective: Literal["sft", "dpo", "ipo", "orpo", "simpo", "cpo", "kto", "reward", "classify"] = Field(
        default="sft",
        description="Training objective. sft is supervised fine-tuning; dpo, ipo, orpo, simpo and cpo learn from "
        "preference pairs, kto from answers rated good or bad; reward trains a model of preference pairs that gives a "
        "text a score; classify learns the labels of texts or images.",
        examples=["dpo"],
    )
    preference: PreferenceSection | None = Field(
        default=None,
        validate_default=True,
        description="Options of the objectives that learn from preferences; null takes their defaults.",
        examples=[{"beta": 0.2}],
    )
    reward: RewardSection | None = Field(
        default=None,
        description="Options of train.objective: reward; null takes their defaults.",
        examples=[{"center": 0.01}],
    )
    classify_by: Literal["head", "tokens"] | None = Field(
        default=None,
        validate_default=True,
        description="How a label is predicted with objective classify: by a head with a score of each label, or by "
        "tokens, the words that the model answers with; null is tokens, and head for images.",
        examples=["tokens"],
    )
    class_weights: ClassWeights = Field(
        default=None,
        description="Weights of labels in the loss that is trained: balanced makes all labels count the same in total; "
        "or a weight for each name, 1 for those that are left out. null weighs every text the same.",
        examples=["balanced"],
    )
    token_loss: Literal["ce", "dft"] = Field(
        default="ce",
        description="Loss of a token while training: ce is the cross-entropy; dft multiplies it by the token's own "
        "probability, which gets no gradient. Evaluations report the cross-entropy.",
        examples=["dft"],
    )
    label_smoothing: Share = Field(
        default=0.0,
        description="Share of each target token that is spread evenly over the vocabulary while training. Evaluations "
        "do not smooth.",
        examples=[0.1],
    )
    output_dir: PathText = Field(
        description="Run directory: config, metrics, checkpoints and adapter. The same command continues a run in it.",
        examples=["runs/my-model"],
    )
    epochs: float = Field(default=1, gt=0, description="Passes over the data; parts of one are allowed.", examples=[3])
    max_steps: Count | None = Field(
        default=None,
        description="Optimizer steps of the run; it overrides train.epochs.",
        examples=[1000],
    )
    micro_batch_size: Count = Field(default=1, description="Sequences per forward pass and process.", examples=[2])
    gradient_accumulation_steps: Count = Field(
        default=16,
        description="Micro-batches per optimizer step. A step sees micro_batch_size × this × processes sequences.",
        examples=[8],
    )
    learning_rate: RateOrAuto = Field(
        default=DEFAULT_LEARNING_RATE,
        description="Peak learning rate; 5e-6 by default for objectives of preferences and ratings. auto computes it "
        "from the base's family and width and the adapters' scaling.",
        examples=["auto"],
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "cosine_restarts"] = Field(
        default="cosine",
        description="How the learning rate falls after the warmup. wsd stays at the peak and falls over "
        "train.decay_ratio of the run; cosine_restarts returns to the peak train.restarts times.",
        examples=["wsd"],
    )
    min_learning_rate: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Learning rate that a schedule falls to.",
        examples=[1e-5],
    )
    decay_ratio: OpenShare | None = Field(
        default=None,
        validate_default=True,
        description="Share of the run, at its end, in which wsd falls; null is 0.2.",
        examples=[0.1],
    )
    restarts: Count | None = Field(
        default=None,
        validate_default=True,
        description="Number of times that cosine_restarts returns to the peak; null is 1.",
        examples=[3],
    )
    learning_rates: dict[str, GroupRate] = Field(
        default={},
        description="Peak learning rates of groups of parameters: lora_A, lora_B, embeddings (trained rows of "
        "embedding and head), magnitude (of DoRA), score (the head of a reward model or classifier). A value is a "
        "rate, or a factor on train.learning_rate, such as 16x.",
        examples=[{"lora_B": "16x"}],
    )
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        default=None,
        description="Steps over which the learning rate rises from zero; null takes train.warmup_ratio.",
        examples=[100],
    )
    warmup_ratio: Share | None = Field(
        default=None,
        validate_default=True,
        description="Share of the run over which the learning rate rises from zero; null is 0.03, unless "
        "train.warmup_steps is set.",
        examples=[0.1],
    )
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_32bit"] = Field(
        default="paged_adamw_8bit",
        description="AdamW with state in 8 or 32 bits. Paged state moves to the host when the GPU is full.",
        examples=["adamw_32bit"],
    )
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="AdamW's decay rates.", examples=[[0.9, 0.95]])
    rounding: Literal["stochastic", "master"] = Field(
        default="stochastic",
        description="How updates of bfloat16 factors are kept: rounded stochastically, or exactly in an fp32 master.",
        examples=["master"],
    )
    max_grad_norm: float | None = Field(
        default=0.3,
        gt=0,
        description="Gradients are clipped to this norm; null clips nothing.",
        examples=[1.0],
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.", examples=[0.01])
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="How a step is handled whose loss or gradient is not finite. Both save the step for --replay.",
        examples=["skip"],
    )
    deterministic: bool = Field(
        default=False,
        description="Use deterministic kernels only, so that a repeated run gives the same bytes on one machine.",
        examples=[True],
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 63,
        strict=True,
        description="Seed of data order, initial values and dropout.",
        examples=[42],
    )
    neftune_alpha: float | None = Field(
        default=None,
        gt=0,
        description="NEFTune: noise U(-1, 1) · alpha / sqrt(tokens of the document · features) on the embedded tokens "
        "while training; null adds none.",
        examples=[5],
    )
    adversarial: AdversarialSection | None = Field(
        default=None,
        description="Train on the mean of the loss and of the loss on perturbed embeddings, in two passes per step; "
        "null is off.",
        examples=[{"epsilon": 0.05}],
    )
    keep: KeepSection | None = Field(
        default=None,
        description="Keep the model close to its base; null is off.",
        examples=[{"kl": 0.1}],
    )
    log_every: Count = Field(default=1, description="Steps between two lines of metrics.jsonl.", examples=[10])
    eval_every: ShareOrSteps = Field(
        default=0.25,
        description="Interval between evaluations: steps, or with a dot and up to 1.0 a share of the run; null never "
        "evaluates.",
        examples=[100],
    )
    save_every: ShareOrSteps = Field(
        default=200,
        description="Interval between checkpoints: steps, or with a dot and up to 1.0 a share of the run; null saves "
        "none during the run.",
        examples=[0.1],
    )
    keep_checkpoints: Count = Field(default=2, description="Number of latest checkpoints that are kept.", examples=[3])
    keep_best: bool | str = Field(
        default=False,
        description="Keep the checkpoint of the best evaluation besides the latest ones, by eval_loss, or by the "
        "metric named here; it is the one that is merged. train.early_stopping implies it.",
        examples=[True],
    )
    early_stopping: EarlyStoppingSection | None = Field(
        default=None,
        description="Stop once evaluations no longer improve; null trains to the last step.",
        examples=[{"metric": "eval_loss", "patience": 3}],
    )
    best_mode: Literal["min", "max"] | None = Field(
        default=None,
        validate_default=True,
        description="Whether the metric of keep_best or early_stopping is best at its smallest (min) or largest value "
        "(max); null knows it of all metrics but those of a function of yours.",
        examples=["min"],
    )
    samples: SamplesSection | None = Field(
        default=None,
        description="Answer a few prompts before the first step, at intervals and after the last step, for the log, "
        "samples.jsonl and the run page; null is off.",
        examples=[{"prompts": 4}],
    )
    trackers: Names = Field(
        default=[],
        description="Trackers of accelerate that metrics are sent to as well, by name.",
        examples=[["tensorboard"]],
    )

    @property
    def has_scores(self) -> bool:
        """Whether a head of scores for whole texts is trained, instead of using the one over the vocabulary."""
        return self.objective in SCORING or self.classify_by == "head"

    @property
    def peak(self) -> float:
        """Peak learning rate of a section in which it is a number."""
        assert not isinstance(self.learning_rate, str), "auto is resolved when a run is assembled"
        return self.learning_rate

    @property
    def best_metric(self) -> str | None:
        """Metric of the evaluations by which the best checkpoint is kept; None if it is not."""
        if self.early_stopping is not None:
            return self.early_stopping.metric
        return "eval_loss" if self.keep_best is True else self.keep_best or None

    def with_learning_rate(self, rate: float) -> "TrainSection":
        """Return the section with another peak learning rate.

        Raises:
            ValidationError: Other keys don't allow it.
        """
        return TrainSection.model_validate(self.model_dump() | {"learning_rate": rate})

    @field_validator("early_stopping")
    @classmethod
    def _check_stopping(cls, value: EarlyStoppingSection | None, info: ValidationInfo) -> EarlyStoppingSection | None:
        kept = info.data.get("keep_best")
        if value is not None and isinstance(kept, str) and kept != value.metric:
            raise ValueError(f"has the metric {value.metric}, but train.keep_best has {kept}; set both to one")
        return value

    @field_validator("best_mode")
    @classmethod
    def _check_best_mode(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not info.data.get("keep_best") and info.data.get("early_stopping") is None:
            raise ValueError("has no effect without train.keep_best or train.early_stopping; remove it, or set one")
        return value

    @field_validator("classify_by", "class_weights")
    @classmethod
    def _check_classify(cls, value: object, info: ValidationInfo) -> object:
        objective = info.data.get("objective", "classify")  # absent if it is invalid itself
        if objective == "classify":
            return "tokens" if value is None and info.field_name == "classify_by" else value
        if value is not None:
            raise ValueError(f"is set, but train.objective is {objective}; remove it, or set objective: classify")
        return None

    @field_validator("token_loss", "label_smoothing")
    @classmethod
    def _check_token_loss(cls, value: str | float, info: ValidationInfo) -> str | float:
        objective = info.data.get("objective", "sft")  # absent if it is invalid itself
        if value not in ("ce", 0) and objective not in TOKEN_LOSS_OBJECTIVES:
            raise ValueError(
                f"changes the loss of tokens, but train.objective {objective} has none; remove it, or set "
                f"objective: {' or '.join(TOKEN_LOSS_OBJECTIVES)}"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_learning_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("objective") in PREFERENCE_DEFAULTS:
            return {"learning_rate": PREFERENCE_LEARNING_RATE} | values
        return values

    @field_validator("learning_rate")
    @classmethod
    def _check_auto(cls, value: float | str, info: ValidationInfo) -> float | str:
        objective = info.data.get("objective")  # absent if it is invalid itself
        if value == "auto" and objective in PREFERENCE_DEFAULTS:
            raise ValueError(
                f"auto is a rule for supervised fine-tuning, far too high for {objective}; remove it, which is "
                f"{PREFERENCE_LEARNING_RATE:g}, or set a number"
            )
        return value

    @field_validator("preference")
    @classmethod
    def _check_preference(cls, value: PreferenceSection | None, info: ValidationInfo) -> PreferenceSection | None:
        objective = info.data.get("objective")  # absent if it is invalid itself
        if objective is None:
            return value
        defaults = PREFERENCE_DEFAULTS.get(objective)
        given = {} if value is None else value.model_dump(exclude_none=True)
        if defaults is None:
            if value is not None:
                raise ValueError(
                    f"has options of {', '.join(PREFERENCE_DEFAULTS)}, but train.objective is {objective}; remove it, "
                    "or set one of these objectives"
                )
            return None
        if unused := sorted(given.keys() - defaults.keys()):
            raise ValueError(f"{', '.join(unused)} has no effect on {objective}; its options are {', '.join(defaults)}")
        return PreferenceSection(**defaults | given)

    @field_validator("reward")
    @classmethod
    def _check_reward(cls, value: RewardSection | None, info: ValidationInfo) -> RewardSection | None:
        objective = info.data.get("objective", "reward")  # absent if it is invalid itself
        if value is not None and objective != "reward":
            raise ValueError(f"has options of reward models, but train.objective is {objective}; remove it")
        return value

    @field_validator("min_learning_rate")
    @classmethod
    def _check_minimum(cls, value: float, info: ValidationInfo) -> float:
        peak = info.data.get("learning_rate")  # absent if it is invalid itself
        if isinstance(peak, float) and value > peak:
            raise ValueError(f"is above train.learning_rate ({peak:g}); lower it")
        return value

    @field_validator("learning_rates")
    @classmethod
    def _check_rates(cls, value: dict[str, float | str], info: ValidationInfo) -> dict[str, float | str]:
        peak = info.data.get("learning_rate")  # absent if it is invalid itself
        for group, rate in value.items():
            if group not in RATE_GROUPS:
                raise ValueError(f"has no group {group!r}; the groups are {', '.join(RATE_GROUPS)}")
            try:
                rate_factor(rate, peak if isinstance(peak, float) else DEFAULT_LEARNING_RATE)
            except ValueError as error:
                raise ValueError(f"has a wrong value of {group}: {error}") from None
        return value

    @field_validator("warmup_ratio")
    @classmethod
    def _check_warmup(cls, value: float | None, info: ValidationInfo) -> float | None:
        steps = info.data.get("warmup_steps")
        if steps is None:
            return DEFAULT_WARMUP_RATIO if value is None else value
        if value is not None:
            raise ValueError(f"is set, and so is train.warmup_steps ({steps}); set one of them to null")
        return None

    @field_validator(*SCHEDULER_OPTIONS)
    @classmethod
    def _check_scheduler_option(cls, value: float | None, info: ValidationInfo) -> float | None:
        assert info.field_name is not None
        scheduler, default = SCHEDULER_OPTIONS[info.field_name]
        chosen = info.data.get("lr_scheduler", scheduler)  # absent if it is invalid itself
        if chosen == scheduler:
            return default if value is None else value
        if value is not None:
            raise ValueError(f"is set, but train.lr_scheduler is {chosen}; remove it, or set lr_scheduler: {scheduler}")
        return None
