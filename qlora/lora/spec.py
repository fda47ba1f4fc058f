"""What an adapter is: its ranks, scaling, first values and form, validated once and asked everywhere."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from qlora.dtypes import as_dtype
from qlora.errors import ModelError

INITS = ("kaiming", "gaussian")
FORMS = ("auto", "separate", "folded")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A low-rank update scaling · B A (LoRA, arXiv:2106.09685).

    Attributes:
        rank: Rows of A, columns of B.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an input of the low-rank branch while training.
        init: First values of A: `kaiming`, uniform within ±1 / sqrt(in) as in PEFT, or `gaussian`, with deviation
            1 / rank. B is zero.
        rslora: Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank.
        dtype: Dtype of A and B.
        form: How products are computed, see :func:`qlora.lora.function.lora_linear`.

    Raises:
        ModelError: A value is out of range or unknown; names all of them.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    init: str = "kaiming"
    rslora: bool = False
    dtype: Any = torch.bfloat16
    form: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_dtype(self.dtype, ModelError))
        problems = {
            f"rank: {self.rank!r} should be a whole number from 1": type(self.rank) is int and self.rank >= 1,
            f"alpha: {self.alpha!r} should be a number above 0": _is_number(self.alpha) and self.alpha > 0,
            f"dropout: {self.dropout!r} should be from 0 and below 1": _is_number(self.dropout)
            and 0 <= self.dropout < 1,
            f"init: {self.init!r} should be one of {', '.join(INITS)}": self.init in INITS,
            f"form: {self.form!r} should be one of {', '.join(FORMS)}": self.form in FORMS,
            f"dtype: {self.dtype} should be bfloat16, float32 or float16": self.dtype in DTYPES,
            f"form: 'folded' can't drop inputs, so it needs dropout 0, not {self.dropout!r}": not (
                self.form == "folded" and self.dropout
            ),
        }
        if wrong := [problem for problem, is_right in problems.items() if not is_right]:
            raise ModelError("The adapter can't be made:\n" + "\n".join(f"  {problem}" for problem in wrong))

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B for a weight of (out_features, in_features)."""
        return (self.rank, in_features), (out_features, self.rank)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
