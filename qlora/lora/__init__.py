"""LoraLinear over any linear layer, and its injection into a model."""

from qlora.lora.function import WeightsKept, choose_form
from qlora.lora.inject import add_lora, lora_layers, match_targets
from qlora.lora.linear import LoraLinear

__all__ = ["LoraLinear", "WeightsKept", "add_lora", "choose_form", "lora_layers", "match_targets"]
