"""The flat buffer of trained parameters, and paged AdamW over it."""

from qlora.optim.adamw import OPTIMIZERS, FlatAdamW
from qlora.optim.flat import FlatParameters
from qlora.optim.rounding import stochastic_round

__all__ = ["OPTIMIZERS", "FlatAdamW", "FlatParameters", "stochastic_round"]
