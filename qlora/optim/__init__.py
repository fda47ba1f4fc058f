"""The flat buffer of trained parameters, and the optimizers over it."""

from qlora.optim.adamw import FlatAdamW
from qlora.optim.flat import FlatParameters
from qlora.optim.kinds import OPTIMIZERS, FlatOptimizer, make_optimizer
from qlora.optim.paged import unpaged_reason
from qlora.optim.rounding import stochastic_round

__all__ = [
    "OPTIMIZERS",
    "FlatAdamW",
    "FlatOptimizer",
    "FlatParameters",
    "make_optimizer",
    "stochastic_round",
    "unpaged_reason",
]
