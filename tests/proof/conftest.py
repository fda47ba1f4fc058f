"""The proof is of what the export's tests made."""

from tests.export.conftest import merged, own, tied

__all__ = ["merged", "own", "tied"]
