"""The section `lora`: the adapters."""

from typing import Literal

from pydantic import Field, model_validator

from qlora.config.sections.base import Section
from qlora.config.sections.values import AdapterDtype, Alpha, Count, Pattern, Share, Targets


class LoraSection(Section):
    """The adapters."""

    rank: Count = Field(
        default=16,
        description="Rank of the LoRA factors. A higher rank learns more and takes more memory.",
        examples=[64],
    )
    alpha: Alpha = Field(
        default=32,
        description="Numerator of the scaling: the update is multiplied by alpha / rank.",
        examples=[16],
    )
    rank_pattern: dict[Pattern, Count] = Field(
        default={},
        description="Ranks of layers that differ from lora.rank, by regular expressions for the end of their names.",
        examples=[{"down_proj": 32}],
    )
    alpha_pattern: dict[Pattern, Alpha] = Field(
        default={},
        description="Alphas of layers that differ from lora.alpha, by regular expressions for the end of their names.",
        examples=[{"down_proj": 64}],
    )
    dropout: Share = Field(
        default=0.0,
        description="Share of the adapter's inputs that is dropped during training.",
        examples=[0.05],
    )
    targets: Targets = Field(
        default="all-linear",
        description="Linear layers to adapt: all-linear (every one but the output head), or one or more full names, "
        "last parts of names, or regular expressions that match a full name.",
        examples=[["q_proj", "v_proj"]],
    )
    init: Literal["kaiming", "gaussian"] = Field(
        default="kaiming",
        description="Initial values of factor A. Factor B starts at zero.",
        examples=["gaussian"],
    )
    rslora: bool = Field(
        default=False,
        description="Rank-stabilized scaling: alpha / √rank instead of alpha / rank.",
        examples=[True],
    )
    dtype: AdapterDtype = Field(
        default="bfloat16",
        description="Dtype of the factors. With bfloat16, updates are computed in fp32 and rounded as train.rounding "
        "says. bf16 and fp32 are accepted.",
        examples=["float32"],
    )
    form: Literal["auto", "separate", "folded"] = Field(
        default="auto",
        description="How an adapted layer is computed: as separate products, or with the update folded into the "
        "dequantized weight. auto folds large batches. Gradients are exact in both; dropout needs separate.",
        examples=["separate"],
    )
    modules_to_save: list[str] = Field(
        default=[],
        description="Modules that are trained in full next to the adapters: embed_tokens, lm_head or both.",
        examples=[["embed_tokens", "lm_head"]],
    )

    @model_validator(mode="after")
    def _check_form(self) -> "LoraSection":
        if self.form == "folded" and self.dropout:
            raise ValueError(
                f"form: folded has no adapter input, so dropout {self.dropout:g} can't be applied; set "
                "lora.form: auto or lora.dropout: 0"
            )
        return self
