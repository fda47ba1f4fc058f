"""The layers that are quantized to NF4 while a model is loaded, and the stored tensors they come from."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.lora import is_linear, matches, output_head, read_directly, reads_images, text_part, unmatched
from qlora.lora.mixture import routers
from qlora.model.formats import BITSANDBYTES_4BIT, expert_type, weight_format
from qlora.model.names import tensors_of_layers, transposed_modules
from qlora.nf4 import NF4


class LoadingAborted(BaseException):
    """A weight can't be quantized, or a layer not be placed; the message names it, with the reason.

    It is not an `Exception`, because transformers catches those, logs them and continues with the next weight: it would
    read the rest of the base, and its error at the end would not give the reason.
    """


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer that is quantized while a model is loaded.

    Attributes:
        name: Name of the module.
        is_transposed: Whether its weight is stored as (in, out), as GPT-2's are.
    """

    name: str
    is_transposed: bool


def nf4_settings(
    double_quant: bool, compute_dtype: torch.dtype, skip: Iterable[str] = (), expert_type: str = NF4
) -> Any:
    """Return the settings that have transformers quantize a model to NF4, its experts too.

    Args:
        double_quant: Quantize the blocks' statistics too.
        compute_dtype: Dtype of the products.
        skip: Names of the layers that stay in 16 bits, from :func:`layers_in_16bit`; empty for the output head alone.
        expert_type: Type of the experts' codes, from :func:`qlora.model.formats.expert_type`.
    """
    from qlora.model.quantizer import NF4Config

    return NF4Config(
        expert_type=expert_type,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(skip) or None,
    )


def layers_in_16bit(skeleton: Any, keep_16bit: Sequence[str] = ()) -> list[str]:
    """Return the names of the modules that transformers is not to quantize; empty for its default, the output head.

    They are the layers that the config keeps, those whose weight other code reads, routers of experts, and the other
    parts of a multimodal model, also where transformers loads the whole of it.

    Args:
        skeleton: The model without weights.
        keep_16bit: Layers that the config keeps in 16 bits, as `model.keep_16bit` has them.

    Raises:
        ModelError: One of these matches no linear layer.
    """
    from transformers.quantizers import HfQuantizer

    linears = _linears(skeleton)
    problems = [
        unmatched("model.keep_16bit", pattern, skeleton, linears, "quantized")
        for pattern in keep_16bit
        if not any(matches(pattern, name) for name in linears)
    ]
    if problems:
        raise ModelError("\n".join(problems))
    left_out = {*read_directly(skeleton)} | routers(skeleton)
    kept = [name for name in linears if name in left_out or any(matches(pattern, name) for pattern in keep_16bit)]
    text = text_part(skeleton)
    kept += [] if text is None else text.others
    if reads_images(skeleton):  # transformers leaves out the module of the last parameter, here the head's bias
        kept += [name for name, module in skeleton.named_modules() if module is output_head(skeleton)]
    # A list replaces the default ones, also in a config.json that has it.
    return [*HfQuantizer.get_modules_to_not_convert(skeleton), *kept] if kept else []


def settings_of_base(
    files: BaseFiles,
    skeleton: Any,
    quantization: str,
    double_quant: bool,
    compute_dtype: torch.dtype,
    keep_16bit: Sequence[str] = (),
) -> Any:
    """Return the settings that a base is quantized by, now or when its files were written; None for 16 bits.

    Args:
        files: The base's files.
        skeleton: The model without weights.
        quantization: `nf4` or `none`.
        double_quant: Quantize the blocks' statistics too.
        compute_dtype: Dtype of the products.
        keep_16bit: See :func:`layers_in_16bit`.

    Raises:
        ModelError: The base's own settings are damaged, or `keep_16bit` is unknown or has no effect.
    """
    from transformers import BitsAndBytesConfig

    is_stored = weight_format(files, quantization) == BITSANDBYTES_4BIT
    if keep_16bit and (is_stored or quantization == "none"):
        how = "has 4-bit weights already" if is_stored else "is loaded in 16 bits by model.quantization: none"
        raise ModelError(f"model.keep_16bit has no effect, because {files.name} {how}; remove it.")
    if is_stored:
        try:
            return BitsAndBytesConfig.from_dict(dict(files.config["quantization_config"]))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"{files.name}: quantization_config in config.json is damaged; download it again ({error})."
            ) from error
    if quantization == "none":
        return None
    return nf4_settings(double_quant, compute_dtype, layers_in_16bit(skeleton, keep_16bit), expert_type(files))


def with_linears(skeleton: Any) -> Any:
    """Replace GPT-2's `Conv1D` layers of a skeleton by linear layers, which they are in a quantized model."""
    for name in transposed_modules(skeleton):
        layer = skeleton.get_submodule(name)
        skeleton.set_submodule(name, nn.Linear(layer.nx, layer.nf, device="meta"))
    return skeleton


def quantized_names(skeleton: Any, settings: Any) -> list[str]:
    """Return the names of the layers that transformers quantizes, or has quantized, in the model's order.

    Args:
        skeleton: The model without weights.
        settings: Settings that :func:`nf4_settings` returned, or those in a 4-bit base's config.json.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    from qlora.model.quantizer import NAME

    quantizer = AutoHfQuantizer.from_config(settings)
    skipped = quantizer.get_modules_to_not_convert(
        skeleton, settings.llm_int8_skip_modules, skeleton._keep_in_fp32_modules
    )
    takes_subclasses = settings.quant_method == NAME
    return [
        name
        for name in _linears(skeleton)
        if should_convert_module(name, skipped)
        and (takes_subclasses or type(skeleton.get_submodule(name)) in (nn.Linear, Conv1D))
    ]


def find_quantized_layers(
    skeleton: Any, settings: Any, base: str, stored: Collection[str]
) -> dict[str, QuantizedLayer]:
    """Find the layers that transformers quantizes, by the name of the stored tensor that each is loaded from.

    Args:
        skeleton: The model without weights.
        settings: Settings that :func:`nf4_settings` returned.
        base: Name of the base, for messages.
        stored: Names of the tensors in its files.

    Raises:
        ModelError: A layer is not stored as one tensor of its own.
    """
    transposed = transposed_modules(skeleton)
    remedy = "so they can't be quantized one at a time; use another base."
    tensors = tensors_of_layers(skeleton, stored, quantized_names(skeleton, settings), base, remedy)
    return {tensor: QuantizedLayer(layer, layer in transposed) for layer, tensor in tensors.items()}


def _linears(skeleton: Any) -> list[str]:
    """Return the names of the linear layers, GPT-2's transposed ones included."""
    transposed = transposed_modules(skeleton)
    return [name for name, module in skeleton.named_modules() if name in transposed or is_linear(module)]
