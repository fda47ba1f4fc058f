"""The section `export`: the merged weights."""

from typing import Literal

from pydantic import Field

from qlora.config.sections.base import Section
from qlora.config.sections.values import ExportDtype, Size


class ExportSection(Section):
    """The merged weights."""

    dtype: ExportDtype = Field(
        default="float16",
        description="Dtype of the merged weights. fp16, bf16 and fp32 are accepted.",
        examples=["bfloat16"],
    )
    onto: Literal["dequantized", "original", "best"] = Field(
        default="dequantized",
        description="Weights that the update is added to: those that the adapter was trained on, the base's original "
        "ones, or whichever of the two evaluates better.",
        examples=["best"],
    )
    max_shard_size: Size = Field(default="5GB", description="Largest size of one safetensors file.", examples=["2GB"])
