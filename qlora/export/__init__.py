"""Release: adapters merged into weights that load with transformers alone, and the proof that they are right."""

from qlora.export.merge import MergeReport, merge
from qlora.export.verify import VerifyReport, verify

__all__ = ["MergeReport", "VerifyReport", "merge", "verify"]
