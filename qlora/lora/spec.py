"""Specification of an adapter: ranks, scaling, initial values and form, validated once."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora.dtypes import as_dtype
from qlora.errors import ModelError

KINDS = ("lora", "dora", "rows")
TRAINED = ("AB", "B")
# Initial values that need nothing but a seed, and those that are computed from weights or data.
DRAWN_INITS = ("kaiming", "gaussian", "orthogonal")
COMPUTED_INITS = ("pissa", "eva", "reconstruct")
INITS = DRAWN_INITS + COMPUTED_INITS
FORMS = ("auto", "separate", "folded")
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An update of a weight: scaling · B A (LoRA, arXiv:2106.09685), with or without a scale of the rows, or some rows.

    Attributes:
        rank: Rows of A, columns of B; with `rows`, the number of trained rows.
        alpha: Numerator of the scaling. Rows are not scaled.
        dropout: Probability of dropping an input of the update while training.
        kind: `lora`; `dora`, which also trains the norm of each row of the sum (arXiv:2402.09353); or `rows`, which
            adds to the rows of the weight with the largest norms (S2FT, arXiv:2412.06289).
        train: `AB`, or `B` alone on a frozen projection A (LoRA-FA, arXiv:2308.03303).
        init: Initial values, see :mod:`qlora.lora.initial`. The update is zero at first, except with `reconstruct`.
        rslora: Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank.
        dtype: Dtype of the trained values.
        form: How products are computed, see :func:`qlora.lora.function.lora_linears`.
        rank_pattern: Ranks of some layers, see :func:`by_pattern`.
        alpha_pattern: Alphas of some layers.

    Raises:
        ModelError: A value is out of range or unknown; names all of them.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    kind: str = "lora"
    train: str = "AB"
    init: str = "kaiming"
    rslora: bool = False
    dtype: Any = torch.bfloat16
    form: str = "auto"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_dtype(self.dtype, ModelError))
        problems = {
            f"rank: {self.rank!r} should be a whole number from 1": _is_rank(self.rank),
            f"alpha: {self.alpha!r} should be a number above 0": _is_alpha(self.alpha),
            f"dropout: {self.dropout!r} should be from 0 and below 1": _is_number(self.dropout)
            and 0 <= self.dropout < 1,
            f"kind: {self.kind!r} should be one of {', '.join(KINDS)}": self.kind in KINDS,
            f"train: {self.train!r} should be one of {', '.join(TRAINED)}": self.train in TRAINED,
            f"init: {self.init!r} should be one of {', '.join(INITS)}": self.init in INITS,
            f"form: {self.form!r} should be one of {', '.join(FORMS)}": self.form in FORMS,
            f"dtype: {self.dtype} should be bfloat16 or float32": self.dtype in DTYPES,
            f"form: 'folded' can't drop inputs, so it needs dropout 0, not {self.dropout!r}": not (
                self.form == "folded" and self.dropout
            ),
            f"rank_pattern: {self.rank_pattern!r} should map regular expressions to whole numbers from 1": (
                is_pattern_map(self.rank_pattern) and all(map(_is_rank, self.rank_pattern.values()))
            ),
            f"alpha_pattern: {self.alpha_pattern!r} should map regular expressions to numbers above 0": (
                is_pattern_map(self.alpha_pattern) and all(map(_is_alpha, self.alpha_pattern.values()))
            ),
        }
        wrong = [problem for problem, is_right in problems.items() if not is_right]
        wrong += contradictions(self.kind, self.train, self.init, self.rslora)
        if wrong:
            raise ModelError("The adapter's settings are invalid:\n" + "\n".join(f"  {problem}" for problem in wrong))

    @property
    def scaling(self) -> float:
        """The factor on the update in layers that no pattern matches."""
        return 1.0 if self.kind == "rows" else scaling(self.rank, self.alpha, self.rslora)

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters for a weight of (out_features, in_features) that no pattern matches."""
        if self.kind == "rows":
            return {"lora_rows": (self.rank, in_features)}
        factors: dict[str, tuple[int, ...]] = {"lora_A": (self.rank, in_features), "lora_B": (out_features, self.rank)}
        return factors | ({"magnitude": (out_features,)} if self.kind == "dora" else {})

    def largest_rank(self, out_features: int, in_features: int) -> int | None:
        """Return the largest rank for a weight of (out_features, in_features); None if there is no limit."""
        if self.kind == "rows":
            return out_features
        limits = {"orthogonal": in_features, "eva": in_features}
        limits |= dict.fromkeys(("pissa", "reconstruct"), min(out_features, in_features))
        return limits.get(self.init)

    def trains(self, name: str) -> bool:
        """Return whether one of the parameters of :meth:`shapes` is trained."""
        return name != "lora_A" or self.train == "AB"

    def with_rank(self, rank: int) -> "AdapterSpec":
        """Return the spec with another rank and the same scaling."""
        alpha = self.alpha if self.kind == "rows" else self.scaling * (math.sqrt(rank) if self.rslora else rank)
        return replace(self, rank=rank, alpha=alpha)

    def by_layer(self, names: Iterable[str], others: Iterable[str] = ()) -> dict[str, "AdapterSpec"]:
        """Return the spec of each layer, with its own rank and alpha and without patterns.

        Args:
            names: Full names of all adapted layers.
            others: Names of what else is adapted, which patterns may be for.

        Raises:
            ModelError: A pattern matches none of them; names all such patterns.
        """
        names, others = list(names), list(others)
        unmatched = [
            f"lora.{key}: '{pattern}' matches no adapted layer, so it would change nothing; correct or remove it."
            for key in ("rank_pattern", "alpha_pattern")
            for pattern in getattr(self, key)
            if not any(matches(pattern, name) for name in names + others)
        ]
        if unmatched:
            raise ModelError("\n".join(unmatched))
        specs = {}
        for name in names:
            rank = by_pattern(self.rank_pattern, name, self.rank)
            alpha = by_pattern(self.alpha_pattern, name, self.alpha)
            specs[name] = replace(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})
        return specs


def contradictions(kind: str, train: str, init: str, rslora: bool) -> list[str]:
    """Return a line for each pair of an adapter's settings that make no sense together, naming both and the remedy."""
    found = []
    if kind == "rows":
        if train != "AB":
            found.append(f"train: {train!r} needs factors A and B, which kind 'rows' does not have; set train to 'AB'")
        if init != "kaiming":
            found.append(f"init: {init!r} is for factors A and B, but kind 'rows' starts at zero; remove it")
        if rslora:
            found.append("rslora: kind 'rows' is not scaled; set it to False")
    elif train == "B" and init in ("kaiming", "gaussian"):
        found.append(f"init: {init!r} draws an A that is not orthonormal, but train 'B' keeps it; set 'orthogonal'")
    return found


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """Return the factor on B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer's name, as PEFT does.

    Args:
        patterns: Values by regular expressions, see :func:`matches`.
        name: Full name of the layer.
        default: The value if no pattern matches.
    """
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a name, or the end of one from a dot on, as in PEFT's `get_pattern_key`."""
    return re.match(_anchored(pattern), name) is not None


def is_pattern_map(patterns: object) -> bool:
    """Return whether an object maps patterns to values."""
    return isinstance(patterns, Mapping) and all(
        isinstance(pattern, str) and is_regex(_anchored(pattern)) for pattern in patterns
    )


def is_regex(text: str) -> bool:
    """Return whether a text is a regular expression."""
    try:
        return bool(re.compile(text))
    except (re.error, RecursionError, OverflowError):
        return False


def _anchored(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
