"""Verify a merged model's tensors against those computed a second time, and explain mismatches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from qlora.files import BaseFiles
from qlora.files.stored import StoredTensors, row_blocks
from qlora.proof.expected import ExpectedWeights

# Number of values of a tensor by which swapped tensors are recognized.
NUM_SAMPLED = 64
# Share of an update that may be lost, or be there twice, when weights are rounded to blocks of few bits.
LOST_SHARE = 0.5


@dataclass(slots=True)
class TensorCheck:
    """The result of :func:`check_tensors`.

    Attributes:
        problems: A line for each mismatch.
        checked: Number of tensors that were compared.
        max_difference: Largest difference of a value from the expected one before rounding.
    """

    problems: list[str] = field(default_factory=list)
    checked: int = 0
    max_difference: float = 0.0


class Written(Protocol):
    """The tensors of a merged model, by their names in the base's files."""

    @property
    def names(self) -> Iterable[str]:
        """Names of the tensors."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def read(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor, in the file's dtype."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor should have if it is a floating-point one."""

    def slack(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """Return the difference that the format allows for each value, beyond rounding; None if it allows none."""

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return values rounded as in the file, as far as that can be computed here."""


class WrittenFolder:
    """The safetensors of a merged folder.

    Args:
        files: Files of the folder.
        dtype: Dtype that all floating-point tensors should have.
    """

    def __init__(self, files: BaseFiles, dtype: torch.dtype) -> None:
        self.names = files.tensors
        self._stored, self._dtype = StoredTensors(files.headers), dtype

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._stored.shape(name)

    def read(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor, in the file's dtype."""
        return self._stored.read(name, rows)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the merge."""
        return self._dtype

    def slack(self, name: str, values: torch.Tensor) -> None:
        """Return None, since values are only rounded once."""

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return values in the dtype of the merge."""
        return values.to(self._dtype)


def check_tensors(expected: ExpectedWeights, written: Written, names: Iterable[str] | None = None) -> TensorCheck:
    """Compare every written tensor, in blocks of its rows, to within half a unit in the last place.

    Args:
        expected: Merged weights, computed a second time.
        written: Tensors of the merged model.
        names: Names of the tensors that it should have; None for all.
    """
    wanted = list(expected.names if names is None else names)
    check, known = TensorCheck(), {*wanted}
    check.problems += [f"the base's files have no weight of the adapted layer {name}" for name in expected.unplaced]
    check.problems += [f"tensor {name} is missing" for name in wanted if name not in written]
    check.problems += [f"tensor {name} is not in the base" for name in written.names if name not in known]
    comparisons = [_compare(expected, written, name) for name in wanted if name in written]
    check.problems += [problem for each in comparisons if (problem := each.problem(comparisons))]
    check.checked = len(comparisons)
    check.max_difference = max((each.max_difference for each in comparisons), default=0.0)
    return check


def _compare(expected: ExpectedWeights, written: Written, name: str) -> "_Comparison":
    comparison = _Comparison(name, written.dtype(name), has_trained_rows=expected.has_trained_rows(name))
    base = expected.base(name)
    shape = expected.shape(name, base)
    if written.shape(name) != shape:
        comparison.kind_mismatch = f"has the shape {written.shape(name)}, not {shape}"
        return comparison
    slack, rounded = partial(written.slack, name), partial(written.rounded, name)
    for rows in row_blocks(shape):
        update = expected.update(name, rows, base) if expected.is_adapted(name) else None
        comparison.add(written.read(name, rows), expected.rows(name, rows, base), update, slack, rounded)
    return comparison


@dataclass(slots=True)
class _Comparison:
    """The comparison of one written tensor, with the values that explain a mismatch.

    Attributes:
        name: Name of the tensor.
        dtype: Dtype that it should have if it is a floating-point one.
        has_trained_rows: Whether it is an embedding or a head with rows trained in full.
        kind_mismatch: Mismatch of its shape or dtype; empty if there is none.
        is_equal: Whether all values so far match.
        is_coarse: Whether the format may move values by more than rounding to its dtype does.
        is_adapted: Whether an update is added to it.
        max_difference: Largest difference of a value from the expected one before rounding.
        found: First written values; None before any.
        expected: First expected values; None before any.
        sums: Sums over all elements of base², added², update² and added · update, where `added` is the written weight
            minus the base's.
        gaps: In a coarse format, sums over all elements of gap² and gap · update, where `gap` is the written weight
            minus the rounded one; and the number of elements.
    """

    name: str
    dtype: torch.dtype
    has_trained_rows: bool = False
    kind_mismatch: str = ""
    is_equal: bool = True
    is_coarse: bool = False
    is_adapted: bool = False
    max_difference: float = 0.0
    found: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    gaps: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add(
        self,
        found: torch.Tensor,
        base: torch.Tensor,
        update: tuple[torch.Tensor, torch.Tensor] | None,
        slack: Callable[[torch.Tensor], torch.Tensor | None],
        rounded: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Compare the next rows; `slack` and `rounded` are those of :class:`Written`."""
        wanted = self.dtype if base.is_floating_point() else base.dtype
        if found.dtype != wanted:
            self.kind_mismatch = f"is in {_name(found.dtype)}, not {_name(wanted)}"
        expected = base if update is None else base + update[0]
        if self.found is None:
            self.found, self.expected = found.flatten()[:NUM_SAMPLED], expected.flatten()[:NUM_SAMPLED]
        if not base.is_floating_point():
            self.is_equal &= torch.equal(found, base)
            return
        found = found.double()
        difference = (found - expected).abs()
        self.max_difference = max([self.max_difference, *difference.flatten().amax(keepdim=True).tolist()])
        # Only values that are not the nearest number get a bound: one in thousands, for which fp32 was rounded first.
        other = found != expected.to(self.dtype).double()
        bound = spacing(expected[other], self.dtype) / 2 + expected[other].abs() * 2.0**-24
        allowed = slack(expected)
        if allowed is not None:
            self.is_coarse = True
            bound += allowed[other]
        if update is not None:
            self.is_adapted = True
            bound += update[1][other]
            added = found - base
            products = (base * base, added * added, update[0] * update[0], added * update[0])
            self.sums += torch.stack([product.sum() for product in products])
            if allowed is not None:
                gap = found - rounded(expected)
                counted = torch.tensor(float(gap.numel()), dtype=torch.float64)
                self.gaps += torch.stack([(gap * gap).sum(), (gap * update[0]).sum(), counted])
        self.is_equal &= bool((difference[other] <= bound).all())  # false for NaN

    def problem(self, others: Iterable["_Comparison"]) -> str | None:
        """Return a description of the mismatch and its likely cause; None if there is no mismatch."""
        if self.kind_mismatch:
            return f"tensor {self.name} {self.kind_mismatch}"
        if self.is_equal:
            return self._lost_update()
        expected = "base + scaling·B·A" if self.is_adapted else "the base's"
        if self.has_trained_rows:
            expected = "the base's with the trained rows"
        return f"tensor {self.name} is not {expected}: {self._reason(others)}"

    def _lost_update(self) -> str | None:
        """Return a line if the update is missing or multiplied, which a coarse format's bounds may not show.

        Where the file's rounding is computed here, the right weights have no gap. Otherwise the gaps are its errors,
        as good as independent of the update, so that their sum with it is near 0.
        """
        update, (squares, along, count) = self.sums[2].item(), self.gaps.tolist()
        if not self.is_coarse or not update:
            return None
        noise = (squares / count / update) ** 0.5
        if abs(along / update) <= LOST_SHARE + 6 * noise:
            return None
        return (
            f"tensor {self.name} is not base + scaling·B·A: its update is missing, multiplied, or lost by rounding, as "
            "where the base's own values come from a format of as few bits"
        )

    def _reason(self, others: Iterable["_Comparison"]) -> str:
        for other in others:
            if other.name != self.name and _is_rounded(self.found, other.expected):
                return f"it contains {other.name}"
        base, added, update, along = self.sums.tolist()
        share = along / update if update else 1.0
        rounding = base * (torch.finfo(self.dtype).eps / 2) ** 2
        if added - share * along < 0.01 * update + rounding:  # the added values are a multiple of the update
            if abs(share) < 0.05:
                return "its update is missing"
            if abs(share - 1) > 0.01:
                return f"its update is {share:.3g} times what it should be"
        return f"values differ by up to {self.max_difference:.3g}"


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance from each number to the next larger one in magnitude in a dtype, fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)


def _is_rounded(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Return whether values equal the expected ones, rounded to a narrower dtype."""
    if found is None or expected is None or found.shape != expected.shape or not expected.is_floating_point():
        return False
    return bool(((found.double() - expected).abs() <= spacing(expected, found.dtype)).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
