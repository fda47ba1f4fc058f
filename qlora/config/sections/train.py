"""The section `train`: the run."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from qlora.config.sections.base import Section
from qlora.config.sections.values import Count, Names, PathText, Share, ShareOrSteps


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
        description="Factor of KL(base ‖ model) per supervised token of the current batch, which is added to the loss. "
        "The base is the model without its adapter.",
        examples=[0.1],
    )


class TrainSection(Section):
    """The run."""

    objective: Literal["sft"] = Field(
        default="sft",
        description="Training objective: sft is supervised fine-tuning.",
        examples=["sft"],
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
    learning_rate: float = Field(default=2e-4, gt=0, lt=1, description="Peak learning rate.", examples=[1e-4])
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="How the learning rate falls after the warmup.",
        examples=["constant"],
    )
    min_learning_rate: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Learning rate at the end of a cosine or linear schedule.",
        examples=[1e-5],
    )
    embedding_learning_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Peak learning rate of trained rows of embedding and head; null takes train.learning_rate.",
        examples=[5e-5],
    )
    warmup_ratio: Share = Field(
        default=0.03,
        description="Share of the run over which the learning rate rises from zero.",
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
        description="Keep the model close to its base; null adds nothing to the loss.",
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
    trackers: Names = Field(
        default=[],
        description="Trackers of accelerate that metrics are sent to as well, by name.",
        examples=[["tensorboard"]],
    )

    @field_validator("min_learning_rate")
    @classmethod
    def _check_minimum(cls, value: float, info: ValidationInfo) -> float:
        peak = info.data.get("learning_rate")  # absent if it is invalid itself
        if peak is not None and value > peak:
            raise ValueError(f"is above train.learning_rate ({peak:g}); lower it")
        return value
