"""The quantizer that transformers loads a model with: its own for NF4, which also takes plain subclasses of linears.

Importing this file registers it with transformers, under a name of its own.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from qlora.lora import is_linear

NAME = "qlora-nf4"


@register_quantization_config(NAME)
class NF4Config(BitsAndBytesConfig):
    """Settings that select the quantizer; in files they are bitsandbytes' own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = NAME

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as config.json has them."""
        return super().to_dict() | {"quant_method": QuantizationMethod.BITS_AND_BYTES}


@register_quantizer(NAME)
class NF4Quantizer(Bnb4BitHfQuantizer):
    """Quantizes what transformers does, and subclasses of `nn.Linear` that compute the same, such as Falcon's."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear and is_linear(module):
                with torch.device("meta"):
                    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                model.set_submodule(name, plain.to(module.weight.dtype))
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
