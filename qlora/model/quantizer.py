"""transformers' quantizer for NF4, which also quantizes the experts of a mixture as they are read."""

import re
from functools import cache
from typing import Any

import torch
from torch import nn

from qlora.lora.mixture import expert_stacks, routers
from qlora.nf4 import NF4Experts

METHOD = "qlora_nf4"


@cache
def register() -> str:
    """Register the quantizer with transformers, and return its name."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class Quantize(ConversionOps):
        """What transformers calls with the value of a parameter that is to be quantized."""

        def __init__(self, quantizer: Any) -> None:
            self._quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            """Return the quantized parameters by name."""
            experts = {name: value for name, value in input_dict.items() if name in self._quantizer.stacks}
            others = {name: value for name, value in input_dict.items() if name not in experts}
            found = {name: self._quantizer.quantize_experts(name, value) for name, value in experts.items()}
            return found | (self._quantizer.linear_operation.convert(others, **kwargs) if others else {})

    @register_quantizer(METHOD)
    class NF4Quantizer(Bnb4BitHfQuantizer):
        """bitsandbytes' quantizer of linear layers, and experts besides.

        Attributes:
            stacks: The experts' parameters by name.
            experts: Those that were quantized.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.stacks: dict[str, Any] = {}
            self.experts: dict[str, NF4Experts] = {}

        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
            self.stacks = expert_stacks(model)
            super()._process_model_before_weight_loading(model, device_map, **kwargs)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            """Return whether a parameter is to be quantized."""
            return param_name in self.stacks or super().param_needs_quantization(model, param_name, **kwargs)

        def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
            """Return patterns of the linear layers that stay as they are: the head, and the routers."""
            kept = [f"{re.escape(name)}$" for name in sorted(routers(model))]
            return super().get_modules_to_not_convert(model, *args, **kwargs) + kept

        @property
        def linear_operation(self) -> Any:
            """The operation that quantizes linear layers."""
            return super().get_quantize_ops()

        def get_quantize_ops(self) -> Any:
            """Return the operation that quantizes a parameter."""
            return Quantize(self)

        def quantize_experts(self, name: str, value: Any) -> nn.Parameter:
            """Quantize the experts of a parameter, keep them, and return their codes."""
            weight: torch.Tensor = value[0] if isinstance(value, list) else value
            self.experts[name] = NF4Experts.from_weight(weight, self.quantization_config.bnb_4bit_use_double_quant)
            return self.experts[name].weight

    return METHOD
