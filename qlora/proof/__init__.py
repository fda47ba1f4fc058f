"""Verification of a release: adapters and merged models compared with their run."""

from qlora.proof.verify import VerifyReport, verify

__all__ = ["VerifyReport", "verify"]
