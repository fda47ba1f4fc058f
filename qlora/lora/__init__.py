"""LoraLinear over any linear layer, and its injection into a model."""

from qlora.lora.inject import add_lora, lora_layers, match_targets
from qlora.lora.linear import LoraLinear

__all__ = ["LoraLinear", "add_lora", "lora_layers", "match_targets"]
