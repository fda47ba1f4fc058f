"""The quantizer that transformers loads a model with: its own for NF4, which also takes experts.

It takes subclasses of `nn.Linear` that compute the same, too. Importing this file registers it with transformers, under
a name of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from qlora.lora import is_linear
from qlora.lora.mixture import ExpertStack, expert_stacks
from qlora.model.quantization import LoadingAborted
from qlora.nf4 import NF4, NF4Experts

NAME = "qlora-nf4"


@register_quantization_config(NAME)
class NF4Config(BitsAndBytesConfig):
    """Settings that select the quantizer; in files they are bitsandbytes' own.

    Args:
        expert_type: Type of the experts' codes, see :meth:`NF4Experts.from_weight`.
        settings: Settings of bitsandbytes.

    Attributes:
        after_weight: Called with the model and the quantized experts by name, after a weight was quantized; those
            before it are in the model by then. It raises :class:`LoadingAborted` only, so that loading ends there.
    """

    after_weight: Callable[[Any, dict[str, NF4Experts]], None] | None = None

    def __init__(self, expert_type: str = NF4, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = NAME
        self.expert_type = expert_type

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as config.json has them."""
        ours = ("expert_type", "after_weight")
        own = {key: value for key, value in super().to_dict().items() if key not in ours}
        return own | {"quant_method": QuantizationMethod.BITS_AND_BYTES}


@register_quantizer(NAME)
class NF4Quantizer(Bnb4BitHfQuantizer):
    """Quantizes what transformers does, subclasses of `nn.Linear` that compute the same (Falcon's), and experts.

    Attributes:
        stacks: The experts' parameters by name.
        experts: Those that were quantized.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.stacks: dict[str, ExpertStack] = {}
        self.experts: dict[str, NF4Experts] = {}

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and type(module) is not nn.Linear and is_linear(module):
                with torch.device("meta"):
                    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                model.set_submodule(name, plain.to(module.weight.dtype))
        self.stacks = expert_stacks(model)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is to be quantized."""
        return param_name in self.stacks or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        """Return the operation that quantizes a parameter."""
        return _Quantize(self, super().get_quantize_ops())


class _Quantize(ConversionOps):
    """What transformers calls with the value of a parameter that is to be quantized.

    Args:
        quantizer: The quantizer, which keeps experts.
        linears: bitsandbytes' operation for linear layers.
    """

    def __init__(self, quantizer: NF4Quantizer, linears: Any) -> None:
        self._quantizer, self._linears = quantizer, linears

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return the quantized parameters by name; of experts, their codes.

        Raises:
            LoadingAborted: One can't be quantized, or `after_weight` failed.
        """
        try:
            found = self._quantized(input_dict, **kwargs)
        except Exception as error:
            raise LoadingAborted(f"{', '.join(input_dict)}: {error}") from error
        if self._quantizer.quantization_config.after_weight is not None:
            self._quantizer.quantization_config.after_weight(kwargs["model"], self._quantizer.experts)
        return found

    def _quantized(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        quantizer, found, others = self._quantizer, dict[str, Any](), dict[str, Any]()
        for name, value in input_dict.items():
            if name not in quantizer.stacks:
                others[name] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            settings, is_transposed = quantizer.quantization_config, quantizer.stacks[name].is_transposed
            quantizer.experts[name] = NF4Experts.from_weight(
                weight, settings.bnb_4bit_use_double_quant, settings.expert_type, is_transposed
            )
            found[name] = quantizer.experts[name].weight
        return found | (self._linears.convert(others, **kwargs) if others else {})
