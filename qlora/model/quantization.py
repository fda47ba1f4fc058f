"""The layers that transformers quantizes to NF4 while it loads a model, and the stored tensors they come from."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora.errors import ModelError
from qlora.model.names import names_in_files, transposed_modules
from qlora.model.quantizer import register
from qlora.nf4 import is_bitsandbytes_linear


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A layer that is quantized while a model is loaded.

    Attributes:
        name: Name of the module.
        is_transposed: Whether its weight is stored as (in, out), as GPT-2's are.
    """

    name: str
    is_transposed: bool


def nf4_settings(double_quant: bool, compute_dtype: torch.dtype) -> Any:
    """Return the settings that have transformers quantize a model to NF4, its experts too."""
    settings = bitsandbytes_settings(double_quant, compute_dtype)
    settings.quant_method = register()
    return settings


def bitsandbytes_settings(double_quant: bool, compute_dtype: torch.dtype) -> Any:
    """Return the settings of a model whose linear layers are stored in NF4."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def find_quantized_layers(skeleton: Any, settings: Any, base: str, stored: Iterable[str]) -> dict[str, QuantizedLayer]:
    """Find the layers that transformers quantizes, by the name of the stored tensor that each is loaded from.

    Args:
        skeleton: The model without weights. Its linear layers are replaced by bitsandbytes'.
        settings: Settings that :func:`nf4_settings` returned.
        base: Name of the base, for messages.
        stored: Names of the tensors in its files.

    Raises:
        ModelError: A layer is not stored as one tensor, but as a part of one or as several.
    """
    from transformers.quantizers import AutoHfQuantizer

    tensors, _ = names_in_files(skeleton, stored)
    transposed = transposed_modules(skeleton)
    AutoHfQuantizer.from_config(settings).preprocess_model(skeleton, device_map=None)
    layers = [name for name, module in skeleton.named_modules() if is_bitsandbytes_linear(module)]
    missing = [layer for layer in layers if f"{layer}.weight" not in tensors]
    if missing:
        raise ModelError(
            f"{len(missing)} layers are not tensors of their own in the files of {base} ({', '.join(missing[:3])} …); "
            "load the model with transformers, save it, and use that."
        )
    return {tensors[f"{layer}.weight"]: QuantizedLayer(layer, layer in transposed) for layer in layers}
