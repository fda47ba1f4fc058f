"""Release weights: runs merged into models that load without qlora, and models stored in 4 bits."""

from qlora.export.companions import MergeReport
from qlora.export.held_out import Judge
from qlora.export.merge import merge
from qlora.export.quantize import QuantizeReport
from qlora.export.quantize import quantize_model as quantize

__all__ = ["Judge", "MergeReport", "QuantizeReport", "merge", "quantize"]
