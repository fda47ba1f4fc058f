"""Fast operations, each beside its plain-torch twin."""

from qlora.kernels.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
