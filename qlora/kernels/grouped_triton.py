"""The kernels of :mod:`qlora.kernels.grouped`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.grouped import ExpertGroup
from qlora.kernels.tiles import num_tiles, power_of_2

# Rows of a tile, and its features: at least as many as tensor cores take. A program sums over `DEPTH` products at a
# time.
ROWS, LEAST_FEATURES, MOST_FEATURES, DEPTH = 64, 16, 128, 32
# Nothing can be fused: it is set because Triton's default changes between versions, and 3.9 warns where it is not set.
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def tile_size(features: int, most: int = MOST_FEATURES) -> int:
    """Return the features of a tile: a power of 2 that covers them, within the limits."""
    return min(most, max(LEAST_FEATURES, power_of_2(features)))


def grouped_matmul_triton(
    x: torch.Tensor,
    weights: torch.Tensor,
    group: ExpertGroup,
    *,
    bias: torch.Tensor | None = None,
    of_group: bool = False,
) -> torch.Tensor:
    """Do what :func:`qlora.kernels.grouped.grouped_matmul` does in one launch, for weights of the dtype of `x`."""
    x, (features, depth) = x.contiguous(), weights.shape[1:]
    assert weights.dtype == x.dtype
    assert bias is None or bias.is_contiguous()
    out = x.new_empty(len(x), features)
    tile = tile_size(features)
    grid = (num_tiles(group.most_rows, ROWS) * num_tiles(features, tile), len(group.experts))
    with torch.cuda.device_of(x):
        _matmul_kernel[grid](
            x, weights, bias, group.index, group.bounds, out, features, depth, *weights.stride(),
            OF_GROUP=of_group, ROWS=ROWS, FEATURES=tile, DEPTH=DEPTH, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


def grouped_outer_triton(
    left: torch.Tensor, right: torch.Tensor, group: ExpertGroup, out: torch.Tensor, scaling: float = 1.0
) -> None:
    """Do what :func:`qlora.kernels.grouped.grouped_outer` does in one launch."""
    left, right = left.contiguous(), right.contiguous()
    assert left.dtype == right.dtype
    assert out.is_contiguous()
    tiles = tile_size(left.shape[1], ROWS), tile_size(right.shape[1])
    grid = (num_tiles(left.shape[1], tiles[0]) * num_tiles(right.shape[1], tiles[1]), len(group.experts))
    with torch.cuda.device_of(left):
        _outer_kernel[grid](
            left, right, group.index, group.bounds, out, left.shape[1], right.shape[1], scaling,
            LEFT=tiles[0], RIGHT=tiles[1], ROWS=DEPTH, **LAUNCH_OPTIONS,
        )  # fmt: skip


# Groups begin anywhere in the order of experts, and one compiled kernel is for all of them.
@triton.jit(do_not_specialize_on_alignment=["index"])
def _matmul_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as code.
    x,
    weights,
    bias,
    index,
    bounds,
    out,
    features,
    depth,
    expert_stride,
    feature_stride,
    depth_stride,
    OF_GROUP: tl.constexpr,  # The weights are in the group's order instead of the layer's.
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    slot, tiles = tl.program_id(1), (features + FEATURES - 1) // FEATURES
    expert = tl.load(index + slot)
    start, first = tl.load(bounds + expert), tl.load(bounds + tl.load(index))
    num_rows = tl.load(bounds + expert + 1) - start
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(0) % tiles * FEATURES + tl.arange(0, FEATURES)
    if tl.program_id(0) // tiles * ROWS >= num_rows:
        return
    # In 64 bits, as is everything that is computed from it: there may be more than 2^31 values.
    place = (start - first + row)[:, None]
    weights += (slot.to(tl.int64) if OF_GROUP else expert) * expert_stride
    inside_row, inside_feature = (row < num_rows)[:, None], (feature < features)[None, :]
    products = tl.full((ROWS, FEATURES), 0.0, tl.float32)
    for first_depth in range(0, depth, DEPTH):
        along = first_depth + tl.arange(0, DEPTH)
        inside = along < depth
        left = tl.load(x + place * depth + along[None, :], mask=inside_row & inside[None, :], other=0.0)
        right = tl.load(
            weights + along[:, None] * depth_stride + feature[None, :] * feature_stride,
            mask=inside[:, None] & inside_feature,
            other=0.0,
        )
        products = tl.dot(left, right, products, input_precision="ieee")
    if bias is not None:
        products += tl.load(bias + expert * features + feature, mask=feature < features, other=0.0)[None, :]
    tl.store(
        out + place * features + feature[None, :],
        products.to(out.dtype.element_ty),
        mask=inside_row & inside_feature,
    )


@triton.jit(do_not_specialize_on_alignment=["index"])
def _outer_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    index,
    bounds,
    out,
    num_left,
    num_right,
    scaling,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = (num_right + RIGHT - 1) // RIGHT
    expert = tl.load(index + tl.program_id(1))
    start, stop, first = tl.load(bounds + expert), tl.load(bounds + expert + 1), tl.load(bounds + tl.load(index))
    of_left = tl.program_id(0) // tiles * LEFT + tl.arange(0, LEFT)
    of_right = tl.program_id(0) % tiles * RIGHT + tl.arange(0, RIGHT)
    inside_left, inside_right = (of_left < num_left)[:, None], (of_right < num_right)[None, :]
    products = tl.full((LEFT, RIGHT), 0.0, tl.float32)
    for first_row in range(start - first, stop - first, ROWS):
        row = first_row + tl.arange(0, ROWS)
        inside = row < stop - first
        one = tl.load(left + row[None, :] * num_left + of_left[:, None], mask=inside_left & inside[None, :], other=0.0)
        other = tl.load(
            right + row[:, None] * num_right + of_right[None, :], mask=inside[:, None] & inside_right, other=0.0
        )
        products = tl.dot(one, other, products, input_precision="ieee")
    tl.store(
        out + (expert * num_left + of_left[:, None]) * num_right + of_right[None, :],
        (products * scaling).to(out.dtype.element_ty),
        mask=inside_left & inside_right,
    )
