"""Products of several experts at once: the rows of each with a matrix of its own.

The functions here choose between two ways that give the same within rounding: a loop over the experts in plain torch,
and one launch of a kernel in :mod:`qlora.kernels.grouped_triton`. Rows are in the order of their experts, and each sum
is computed by one program in a fixed order. A result does not depend on the number of rows of other experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlora.kernels.deltas import LowRank
from qlora.kernels.dequantize import HAS_TRITON
from qlora.kernels.fused import describe_failure
from qlora.kernels.scratch import scratch

# Bytes of the weights that are dequantized at a time, with the kernels and in a loop. In a loop, groups only save calls
# of small experts; large weights are faster one at a time.
GROUP_BYTES, LOOP_BYTES = 128 << 20, 2 << 20
# Rows of a group, as a multiple of the tokens, of which one expert gets at most all; and rows that are always few.
ROWS_PER_TOKEN = 2
FEW_ROWS = 1024
# The lowest compute capability that the kernels were compiled for.
LEAST_CAPABILITY = (8, 0)

# Why the loop is used on a device for a dtype, or None if the kernels gave the same as the loop.
_reasons: dict[tuple[torch.device, torch.dtype], str | None] = {}


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts whose weights are in memory together, and their rows.

    Attributes:
        experts: Their numbers in the layer, ascending; each has at least one row.
        starts: Where the rows of each begin among the rows of all experts of the layer, and where the last ones end.
        index: `experts` on the device, (experts of the group,), int64.
        bounds: Where the rows of each expert of the layer begin, and the end, on the device: (experts + 1,), int64.
    """

    experts: Sequence[int]
    starts: Sequence[int]
    index: torch.Tensor
    bounds: torch.Tensor

    @property
    def rows(self) -> slice:
        """The group's rows among the rows of all experts of the layer."""
        return slice(self.starts[0], self.starts[-1])

    @property
    def most_rows(self) -> int:
        """The largest number of rows of an expert."""
        return max(stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False))

    def first(self, number: int) -> "ExpertGroup":
        """Return the group of the first experts."""
        return ExpertGroup(self.experts[:number], self.starts[: number + 1], self.index[:number], self.bounds)

    def __iter__(self) -> Iterator[tuple[int, int, slice]]:
        """Yield each expert's place in the group, its number, and its rows among the group's."""
        first = self.starts[0]
        for slot, expert in enumerate(self.experts):
            yield slot, expert, slice(self.starts[slot] - first, self.starts[slot + 1] - first)


def group_experts(
    offsets: Sequence[int], hit: torch.Tensor, bounds: torch.Tensor, most_experts: int, most_rows: int
) -> Iterator[ExpertGroup]:
    """Divide the experts that have rows into groups, in their order.

    Args:
        offsets: Where the rows of each expert begin, and the end: `bounds` on the host.
        hit: The experts on the device, those with rows first and both in their order: (experts,), int64.
        bounds: (experts + 1,), int64.
        most_experts: Number of experts of a group.
        most_rows: Number of rows of a group, unless a single expert has more.
    """
    first, experts, starts = 0, list[int](), list[int]()
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if start == stop:
            continue
        if experts and (len(experts) == most_experts or stop - starts[0] > most_rows):
            yield ExpertGroup(experts, [*starts, start], hit[first : first + len(experts)], bounds)
            first, experts, starts = first + len(experts), [], []
        experts.append(expert)
        starts.append(start)
    if experts:
        yield ExpertGroup(experts, [*starts, offsets[-1]], hit[first : first + len(experts)], bounds)


def fold_group(
    weights: torch.Tensor, update: LowRank | None, group: ExpertGroup, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weights of a group's experts with the term of each added, rounded once.

    Args:
        weights: (experts of the group, rows, columns); returned as they are without an update.
        update: Terms of all experts of the layer, in any dtype.
        group: The experts.
        out: Like `weights`, written in place if given; may be `weights` itself.
    """
    if update is None:
        return weights
    if len(group.experts) == 1:
        own = update.at(group.experts[0]).to(weights.dtype)
        return own.fold(weights[0], None if out is None else out[0])[None]
    A, B = (factor.index_select(0, group.index).to(weights.dtype) for factor in update.tensors)
    return torch.baddbmm(weights, B, A, alpha=update.scaling, out=out)


def weights_of_group(
    weights: torch.Tensor, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None = None
) -> torch.Tensor:
    """Return the weights of a group for a product that starts at once, from those of all experts; read it only.

    Args:
        weights: (experts, rows, columns) of all experts of the layer; not copied if nothing is added and the group's
            are next to each other.
        group: The experts.
        dtype: Dtype of the result.
        update: Terms of all experts, of which each expert's is added to its weight.

    Returns:
        (experts of the group, rows, columns).
    """
    first, last = group.experts[0], group.experts[-1]
    are_neighbours = last - first + 1 == len(group.experts)
    own = (weights[first : last + 1] if are_neighbours else weights.index_select(0, group.index)).to(dtype)
    return fold_group(own, update, group, None if update is None else scratch(own.shape, dtype, own.device))


def grouped_matmul(
    x: torch.Tensor,
    weights: torch.Tensor,
    group: ExpertGroup,
    *,
    bias: torch.Tensor | None = None,
    of_group: bool = False,
) -> torch.Tensor:
    """Multiply the rows of each expert by its matrix, x Wᵀ + bias.

    Args:
        x: (rows, in), the group's.
        weights: (experts, out, in) of all experts of the layer; of any strides. Cast to the dtype of `x`.
        group: The experts.
        bias: (experts, out) of all experts of the layer.
        of_group: `weights` are of the group's experts alone.

    Returns:
        (rows, out), in the dtype of `x`.
    """
    if loop_reason(x.device, x.dtype) is None:
        from qlora.kernels.grouped_triton import grouped_matmul_triton

        return grouped_matmul_triton(x, weights.to(x.dtype), group, bias=bias, of_group=of_group)
    return grouped_matmul_plain(x, weights, group, bias=bias, of_group=of_group)


def grouped_outer(
    left: torch.Tensor, right: torch.Tensor, group: ExpertGroup, out: torch.Tensor, scaling: float = 1.0
) -> None:
    """Write the sum over each expert's rows of the products of two features, scaling · leftᵀ right.

    Args:
        left: (rows, m), the group's.
        right: (rows, n), of the dtype of `left`.
        group: The experts.
        out: (experts, m, n) of all experts of the layer, contiguous; only those of the group are written.
        scaling: Factor on the sums.
    """
    if loop_reason(left.device, left.dtype) is None:
        from qlora.kernels.grouped_triton import grouped_outer_triton

        grouped_outer_triton(left, right, group, out, scaling)
    else:
        grouped_outer_plain(left, right, group, out, scaling)


def grouped_matmul_plain(
    x: torch.Tensor,
    weights: torch.Tensor,
    group: ExpertGroup,
    *,
    bias: torch.Tensor | None = None,
    of_group: bool = False,
) -> torch.Tensor:
    """Do what :func:`grouped_matmul` does by a loop over the experts, on any device."""
    products = []
    for slot, expert, rows in group:
        weight = weights[slot if of_group else expert].to(x.dtype)
        products.append(F.linear(x[rows], weight, None if bias is None else bias[expert].to(x.dtype)))
    return products[0] if len(products) == 1 else torch.cat(products)


def grouped_outer_plain(
    left: torch.Tensor, right: torch.Tensor, group: ExpertGroup, out: torch.Tensor, scaling: float = 1.0
) -> None:
    """Do what :func:`grouped_outer` does by a loop over the experts, on any device."""
    for _, expert, rows in group:
        torch.mul(left[rows].T @ right[rows], scaling, out=out[expert])


def experts_at_once(device: torch.device, dtype: torch.dtype, num_weights: int, try_kernels: bool = True) -> int:
    """Return the number of experts of a group on a device.

    Args:
        device: Device of the products.
        dtype: Dtype of the products.
        num_weights: Number of weights of an expert in its larger projection.
        try_kernels: Try the kernels on the device first; False for an estimate, which assumes that they work.
    """
    reason = loop_reason(device, dtype) if try_kernels else _loop_reason_without_trial(device, dtype)
    return max(1, (GROUP_BYTES if reason is None else LOOP_BYTES) // (num_weights * dtype.itemsize))


def experts_path(device: torch.device, dtype: torch.dtype) -> str:
    """Describe how the products of experts are computed on a device in a dtype, and why."""
    reason = loop_reason(device, dtype)
    return "grouped kernels: they gave what a loop gives here" if reason is None else f"loop over experts: {reason}"


def loop_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why products are computed by the loop on a device; None if the kernels are used.

    The kernels are tried on a small product the first time that they are asked for.
    """
    reason = _loop_reason_without_trial(device, dtype)
    if reason is not None:
        return reason
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if (device, dtype) not in _reasons:
        _reasons[device, dtype] = _try_kernels(device, dtype)
    return _reasons[device, dtype]


def _loop_reason_without_trial(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "the grouped kernels are for CUDA"
    return None if dtype in (torch.bfloat16, torch.float16) else "the grouped kernels are for 16 bits"


def _try_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with the kernels on a device, by products of random rows; None if nothing is."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "the grouped kernels need compute capability {}.{}, this GPU has {}.{}".format(
            *LEAST_CAPABILITY, *capability
        )
    try:
        return compare_kernels(device, dtype)
    except Exception as error:  # a kernel compiler can fail in any way, and the loop works without it
        return f"the grouped kernels failed: {describe_failure(error)}"


def compare_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare the kernels with a loop in fp64 on small random matrices; return what differs, or None."""
    generator = torch.Generator().manual_seed(0)  # not the run's generator, which must not advance

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    offsets = [0, 0, 70, 71, 71, 100, 137]
    bounds, hit = torch.tensor(offsets, device=device), torch.tensor([1, 2, 4, 5, 0, 3], device=device)
    for depth in (96, 100):  # a multiple of 16, for which kernels are compiled apart, and of a tile; and neither
        for group in group_experts(offsets, hit, bounds, 3, offsets[-1]):
            for wanted, found in _products_both_ways(group, depth, draw):
                # One rounding is eps / 2 at most. Sums in two orders differ by more only where their terms cancel.
                least = 1e-5 * wanted.abs().max().item()
                if not torch.allclose(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=least):
                    return f"the grouped kernels gave other results in {str(dtype).removeprefix('torch.')}"
    return None


def _products_both_ways(
    group: ExpertGroup, depth: int, draw: Callable[..., torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield products of a group's rows of `depth` features by the loop in fp64, and by the kernels.

    They are those of weights, of factors A and of biases as weights, and the gradient of a factor.
    """
    from qlora.kernels.grouped_triton import grouped_matmul_triton, grouped_outer_triton

    num_experts, num_rows, rank, features = len(group.bounds) - 1, group.starts[-1] - group.starts[0], 8, 160
    x, u, bias = draw(num_rows, depth), draw(num_rows, rank), draw(num_experts, features)
    own, A, row = (
        draw(n, m, depth) for n, m in ((len(group.experts), features), (num_experts, rank), (num_experts, 1))
    )
    calls = [(own, None, True), (own.mT.contiguous().mT, bias, True), (A, None, False), (row, None, False)]
    for weights, added, of_group in calls:
        yield (
            grouped_matmul_plain(x.double(), weights, group, bias=added, of_group=of_group),
            grouped_matmul_triton(x, weights, group, bias=added, of_group=of_group),
        )
    wanted, found = torch.zeros_like(A, dtype=torch.double), torch.zeros_like(A)
    grouped_outer_plain(u.double(), x.double(), group, wanted, 0.5)
    grouped_outer_triton(u, x, group, found, 0.5)
    yield wanted, found
