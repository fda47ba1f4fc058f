"""A merged model's tensors against those computed a second time, and what would explain a difference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from qlora.files import BaseFiles
from qlora.files.stored import StoredTensors, row_blocks
from qlora.proof.expected import ExpectedWeights

# Values of a tensor by which it is known when it lies in another's place.
NUM_SAMPLED = 64


@dataclass(slots=True)
class TensorCheck:
    """What became of the comparison.

    Attributes:
        problems: A line for each tensor that is not what it should be.
        checked: Tensors that were compared.
        max_difference: From the unrounded values, over all numbers.
    """

    problems: list[str] = field(default_factory=list)
    checked: int = 0
    max_difference: float = 0.0


class Written(Protocol):
    """The tensors of a merged model, by their names in the base's files."""

    @property
    def names(self) -> Iterable[str]:
        """Of the tensors."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""

    def read(self, name: str, rows: slice) -> torch.Tensor:
        """Some of its rows, in the dtype that the file has them in."""

    def dtype(self, name: str) -> torch.dtype:
        """That its floating-point numbers should have."""

    def slack(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """What its format may be off by from rows of these values, beyond their rounding; None if nothing."""


class WrittenFolder:
    """A merged folder's safetensors.

    Args:
        files: Of it.
        dtype: That all floating-point numbers should have.
    """

    def __init__(self, files: BaseFiles, dtype: torch.dtype) -> None:
        self.names = files.tensors
        self._stored, self._dtype = StoredTensors(files.headers), dtype

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._stored.shape(name)

    def read(self, name: str, rows: slice) -> torch.Tensor:
        """Some of its rows."""
        return self._stored.read(name, rows)

    def dtype(self, name: str) -> torch.dtype:
        """The same for all."""
        return self._dtype

    def slack(self, name: str, values: torch.Tensor) -> None:
        """None: values are rounded once."""


def check_tensors(expected: ExpectedWeights, written: Written) -> TensorCheck:
    """Compares every written tensor, in blocks of its rows, within half a unit of its last place.

    Args:
        expected: What should be there.
        written: What is.
    """
    check, known = TensorCheck(), {*expected.names}
    check.problems += [f"the base's files hold no weight of the adapted layer {name}" for name in expected.unplaced]
    check.problems += [f"tensor {name} is missing" for name in expected.names if name not in written]
    check.problems += [f"tensor {name} is not in the base" for name in written.names if name not in known]
    comparisons = [_compare(expected, written, name) for name in expected.names if name in written]
    check.problems += [problem for each in comparisons if (problem := each.problem(comparisons))]
    check.checked = len(comparisons)
    check.max_difference = max((each.max_difference for each in comparisons), default=0.0)
    return check


def _compare(expected: ExpectedWeights, written: Written, name: str) -> "_Comparison":
    comparison = _Comparison(name, written.dtype(name), has_trained_rows=expected.has_trained_rows(name))
    base = expected.base(name)
    shape = expected.shape(name, base)
    if written.shape(name) != shape:
        comparison.wrong_kind = f"has the shape {written.shape(name)}, not {shape}"
        return comparison
    slack = partial(written.slack, name)
    for rows in row_blocks(shape):
        update = expected.update(name, rows) if expected.is_adapted(name) else None
        comparison.add(written.read(name, rows), expected.rows(name, rows, base), update, slack)
    return comparison


@dataclass(slots=True)
class _Comparison:
    """A written tensor against what it should be, and what helps to say why it is apart.

    Attributes:
        dtype: That it should have, if its numbers are floating-point ones.
        has_trained_rows: It is an embedding or a head of which rows were trained in full.
        wrong_kind: What is wrong with its shape or dtype.
        sums: Of squares of the base's weights, of what was added to them, and of the update; of the latter two's
            product.
    """

    name: str
    dtype: torch.dtype
    has_trained_rows: bool = False
    wrong_kind: str = ""
    is_equal: bool = True
    is_adapted: bool = False
    max_difference: float = 0.0
    found: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(
        self,
        found: torch.Tensor,
        base: torch.Tensor,
        update: tuple[torch.Tensor, torch.Tensor] | None,
        slack: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        """Compares the next rows."""
        wanted = self.dtype if base.is_floating_point() else base.dtype
        if found.dtype != wanted:
            self.wrong_kind = f"is in {_name(found.dtype)}, not {_name(wanted)}"
        expected = base if update is None else base + update[0]
        if self.found is None:
            self.found, self.expected = found.flatten()[:NUM_SAMPLED], expected.flatten()[:NUM_SAMPLED]
        if not base.is_floating_point():
            self.is_equal &= torch.equal(found, base)
            return
        found = found.double()
        difference = (found - expected).abs()
        self.max_difference = max([self.max_difference, *difference.flatten().amax(keepdim=True).tolist()])
        # Only what is not the nearest number outright is looked at: one in thousands, where fp32 rounded first.
        other = found != expected.to(self.dtype).double()
        bound = spacing(expected[other], self.dtype) / 2 + expected[other].abs() * 2.0**-24
        allowed = slack(expected)
        if allowed is not None:
            bound += allowed[other]
        if update is not None:
            self.is_adapted = True
            bound += update[1][other]
            added = found - base
            products = (base * base, added * added, update[0] * update[0], added * update[0])
            self.sums += torch.stack([product.sum() for product in products])
        self.is_equal &= bool((difference[other] <= bound).all())  # of NaN it is false

    def problem(self, others: Iterable["_Comparison"]) -> str | None:
        """What speaks against it, with the mistake that would have made it, if it is one of the known."""
        if self.wrong_kind:
            return f"tensor {self.name} {self.wrong_kind}"
        if self.is_equal:
            return None
        what = "base + scaling·B·A" if self.is_adapted else "the base's"
        if self.has_trained_rows:
            what = "the base's with the rows that were trained"
        return f"tensor {self.name} is not {what}: {self._reason(others)}"

    def _reason(self, others: Iterable["_Comparison"]) -> str:
        for other in others:
            if other.name != self.name and _is_rounded(self.found, other.expected):
                return f"it holds {other.name}"
        base, added, update, along = self.sums.tolist()
        share = along / update if update else 1.0
        rounding = base * (torch.finfo(self.dtype).eps / 2) ** 2
        if added - share * along < 0.01 * update + rounding:  # what was added lies along the update
            if abs(share) < 0.05:
                return "its update is missing"
            if abs(share - 1) > 0.01:
                return f"its update is {share:.3g} times what it should be"
        return f"values differ by up to {self.max_difference:.3g}"


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from numbers to their neighbours in a dtype, fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)


def _is_rounded(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Whether values are others in a narrower dtype."""
    if found is None or expected is None or found.shape != expected.shape or not expected.is_floating_point():
        return False
    return bool(((found.double() - expected).abs() <= spacing(expected, found.dtype)).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
