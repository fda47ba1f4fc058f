"""Fixtures of the export tests: runs and their merged folders."""

from tests.export.conftest import merged, own, tied

__all__ = ["merged", "own", "tied"]
