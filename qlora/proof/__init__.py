"""The proof of a release: adapters and merged models compared with the run that made them."""

from qlora.proof.verify import VerifyReport, verify

__all__ = ["VerifyReport", "verify"]
