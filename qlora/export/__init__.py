"""Release: a run merged into weights that load without qlora, and models in 4 bits on disk."""

from qlora.export.companions import MergeReport
from qlora.export.merge import merge
from qlora.export.quantize import QuantizeReport
from qlora.export.quantize import quantize_model as quantize

__all__ = ["MergeReport", "QuantizeReport", "merge", "quantize"]
