"""The section `lora`: the adapters."""

from typing import Literal

from pydantic import Field, model_validator

from qlora.config.sections.base import Section
from qlora.config.sections.values import (
    AdapterDtype,
    Alpha,
    Count,
    LayerIndices,
    Names,
    PathText,
    Pattern,
    RankOrAuto,
    Share,
    Targets,
)


class LoraSection(Section):
    """The adapters."""

    kind: Literal["lora", "dora", "rows"] = Field(
        default="lora",
        description="Kind of adapter: low-rank factors; with dora, also the norm of each row of the weight; or rows of "
        "the weight itself, those with the largest norms.",
        examples=["dora"],
    )
    rank: Count = Field(
        default=16,
        description="Rank of the LoRA factors; with lora.kind rows, the number of trained rows. A higher rank learns "
        "more and takes more memory.",
        examples=[64],
    )
    final_rank: Count | None = Field(
        default=None,
        description="Mean rank over all layers at the end: components are removed between 10 and 70 % of the steps, "
        "where they matter least; layers with ranks of their own shrink in proportion. null keeps lora.rank.",
        examples=[8],
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
    layers: LayerIndices | None = Field(
        default=None,
        description="Indices of the decoder layers to adapt, from 0, and ranges such as 8-15; null adapts all.",
        examples=[["0-3", 15]],
    )
    exclude: Names = Field(
        default=[],
        description="Layers of lora.targets that are not adapted, named in the same ways.",
        examples=[["down_proj"]],
    )
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "eva", "reconstruct"] = Field(
        default="kaiming",
        description="Initial values of the factors. kaiming, gaussian and orthogonal draw A; eva takes the main "
        "directions of the layer's inputs, and more rank for layers that need it; pissa takes the main part of the "
        "weight; with these the model starts as the base. reconstruct makes up for what the quantization lost, with a "
        "base quantized to fit.",
        examples=["reconstruct"],
    )
    calibrate: bool = Field(
        default=False,
        description="With lora.init reconstruct: count what the quantization lost by its effect on the inputs that "
        "layers get from a few training examples. The base is loaded twice.",
        examples=[True],
    )
    train: Literal["AB", "B"] = Field(
        default="AB",
        description="Factors that are trained: both, or B on a fixed projection A, which needs lora.init orthogonal, "
        "eva, pissa or reconstruct.",
        examples=["B"],
    )
    start_from: PathText | None = Field(
        default=None,
        description="Adapter to continue from: a run, one of its checkpoints, a PEFT folder or a hub id. A higher "
        "lora.rank adds components to it.",
        examples=["runs/earlier"],
    )
    stack: bool = Field(
        default=False,
        description="Keep the adapter of lora.start_from as it is, and train a new one on top of it.",
        examples=[True],
    )
    expert_rank: RankOrAuto = Field(
        default="auto",
        description="Rank of the adapters of a mixture's experts. auto is lora.rank divided by the number of experts "
        "of a token, at least 1; 0 leaves experts as they are. The scaling is that of the other layers, which "
        "lora.rank and the patterns decide.",
        examples=[4],
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

    @model_validator(mode="after")
    def _check_combinations(self) -> "LoraSection":
        problems = self._contradictions()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> list[str]:
        """Return a line for each pair of keys that make no sense together."""
        problems = []
        is_rows, is_drawn = self.kind == "rows", self.init in ("kaiming", "gaussian", "orthogonal")
        if is_rows:
            unused = {
                "alpha": self.alpha != 32,
                "alpha_pattern": bool(self.alpha_pattern),
                "rslora": self.rslora,
                "init": self.init != "kaiming",
                "train": self.train != "AB",
                "final_rank": self.final_rank is not None,
            }
            problems += [
                f"{key}: lora.kind rows has no factors, and no scaling; remove lora.{key}"
                for key, is_set in unused.items()
                if is_set
            ]
        elif self.train == "B" and self.init in ("kaiming", "gaussian"):
            problems.append(
                f"train: B keeps A as it starts, and lora.init {self.init} does not make its rows orthonormal; set "
                "lora.init: orthogonal"
            )
        if self.final_rank is not None and self.final_rank >= self.rank:
            problems.append(f"final_rank: {self.final_rank} should be below lora.rank ({self.rank})")
        if self.final_rank is not None and self.train == "B":
            problems.append("final_rank: components are judged by both factors, so it needs lora.train: AB")
        if self.final_rank is not None and self.init in ("pissa", "reconstruct"):
            problems.append(
                f"final_rank: with lora.init {self.init} every component starts as a part of the weight, which would "
                "be removed with it; set lora.init: eva"
            )
        if self.start_from is not None and not is_drawn:
            problems.append(f"start_from: the adapter has its values already; remove lora.init: {self.init}")
        if self.calibrate and self.init != "reconstruct":
            problems.append("calibrate: only lora.init: reconstruct weighs what the quantization lost; remove it")
        if self.stack and self.start_from is None:
            problems.append("stack: it needs an adapter to train on top of; set lora.start_from")
        return problems
