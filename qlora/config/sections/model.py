"""The section `model`: the base model and how it is loaded."""

from typing import Literal

from pydantic import Field

from qlora.config.sections.base import Section
from qlora.config.sections.values import ComputeDtype, PathText


class RopeScalingSection(Section):
    """A context longer than the base's own, by scaling its rotary embeddings."""

    type: Literal["yarn", "linear", "dynamic"] = Field(
        default="yarn",
        description="How positions are scaled: yarn keeps short distances apart best; linear interpolates positions; "
        "dynamic scales only sequences longer than the base's own context.",
        examples=["yarn"],
    )
    factor: float = Field(
        gt=1, allow_inf_nan=False, description="How many times longer sequences may be.", examples=[4.0]
    )


class ModelSection(Section):
    """The base model and how it is loaded."""

    base: PathText = Field(
        description="Base model: a local folder, a GGUF file or a model id on the hub. Any causal language model of "
        "transformers.",
        examples=["meta-llama/Llama-3.1-8B"],
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a base on the hub; null takes the default branch.",
        examples=["main"],
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the base. Set it only for bases whose code you have read.",
        examples=[True],
    )
    quantization: Literal["nf4", "none"] = Field(
        default="nf4",
        description="How the base's linear layers are stored: 4-bit NormalFloat, or none for 16 bits.",
        examples=["none"],
    )
    double_quant: bool = Field(
        default=True,
        description="Store the quantization statistics in 8 bits as well: 0.516 instead of 0.563 bytes per parameter.",
        examples=[False],
    )
    rope_scaling: RopeScalingSection | None = Field(
        default=None,
        description="Extend the context of the base. The scaling is written to the config of the merged model.",
        examples=[{"type": "yarn", "factor": 4.0}],
    )
    keep_16bit: list[str] = Field(
        default=[],
        description="Linear layers that are not quantized, such as fragile ones: full names, last parts of names, or "
        "regular expressions. They can still be adapted.",
        examples=[["down_proj"]],
    )
    allow_unquantized: bool = Field(
        default=False,
        description="Train a base even if nf4 leaves more than half of its linear and expert weights in 16 bits.",
        examples=[True],
    )
    compute_dtype: ComputeDtype = Field(
        default="auto",
        description="Dtype of activations and products. auto takes bfloat16 where the hardware has it, else float16 on "
        "GPUs and float32 on CPUs. bf16, fp16 and fp32 are accepted.",
        examples=["bfloat16"],
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        default="auto",
        description="Attention implementation of transformers. auto takes the fastest one that keeps packed documents "
        "apart on this machine.",
        examples=["sdpa"],
    )
    weights: Literal["auto", "device", "sharded", "host"] = Field(
        default="auto",
        description="Where the 4-bit weights of the layers are while training: on the device, sharded over the "
        "processes of the run, or in host memory; the last two copy a layer at a time to the device. auto takes the "
        "first of these that fits.",
        examples=["host"],
    )
    weight_cache: Literal["auto", "none"] = Field(
        default="auto",
        description="Cache dequantized weights in free memory. It saves time and does not change results; none "
        "switches it off.",
        examples=["none"],
    )
    recompute: Literal["auto", "none", "mlp", "attention", "full", "offload", "offload+tiled"] = Field(
        default="auto",
        description="Activation checkpointing (also called gradient checkpointing): how much of the forward pass is "
        "computed again in the backward pass. auto takes the cheapest level that fits into memory.",
        examples=["full"],
    )
