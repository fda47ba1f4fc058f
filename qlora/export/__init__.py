"""Release: adapters merged into weights that load with transformers alone, and the proof that they are right."""

from qlora.export.merge import MergeReport, merge

__all__ = ["MergeReport", "merge"]
