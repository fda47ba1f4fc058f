"""The kernels of :class:`qlora.kernels.norm.RMSNorm`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.tiles import num_tiles, row_tile

# Values of a program's tile, which is at least a row, and of a warp, of which there are at most so many.
TILE, WARP_VALUES, MOST_WARPS = 2048, 512, 16
# Longest row. A program holds whole rows in registers.
MOST_FEATURES = 16_384
# Nothing is fused, so that sums and products round as torch's do.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, rounds_first: bool
) -> torch.Tensor:
    """Compute what :class:`qlora.kernels.norm.RMSNorm` does, reading and writing each value once."""
    dtype = torch.result_type(x, weight) if rounds_first else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=dtype, device=x.device)
    _launch(_norm_kernel, rows, (rows, weight, out), eps, offset, ROUNDS_FIRST=rounds_first)
    return out.view(x.shape)


def rms_norm_gradient_triton(
    grad_output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> torch.Tensor:
    """Compute the gradient of x, see :meth:`qlora.kernels.norm.RMSNorm.gradients`."""
    rows = x.reshape(-1, x.shape[-1])
    grad = grad_output.reshape(rows.shape)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _launch(_norm_gradient_kernel, rows, (grad, rows, weight, out), eps, offset)
    return out.view(x.shape)


def tile_of(features: int) -> tuple[int, int, int]:
    """Return the rows of a tile, its columns and the warps that compute it.

    Raises:
        ValueError: A row is too long.
    """
    if features > MOST_FEATURES:
        raise ValueError(f"the norm's kernel takes rows of up to {MOST_FEATURES:,} features, not {features:,}")
    rows, columns = row_tile(features, TILE)
    return rows, columns, min(MOST_WARPS, rows * columns // WARP_VALUES)


def _launch(
    kernel: object, rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], eps: float, offset: float, **constants: bool
) -> None:
    tile_rows, tile_columns, warps = tile_of(rows.shape[1])
    grid = (num_tiles(len(rows), tile_rows),)
    with torch.cuda.device_of(rows):
        kernel[grid](  # type: ignore[index]
            *(tensor.contiguous() for tensor in tensors), *rows.shape, eps, offset,
            **constants, ROWS=tile_rows, COLUMNS=tile_columns, num_warps=warps, **LAUNCH_OPTIONS,
        )  # fmt: skip


@triton.jit
def _add(one, other):  # type: ignore[no-untyped-def]  # Triton reads annotations as code.
    return one + other


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    num_rows,
    features,
    eps,
    offset,
    ROUNDS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # In 64 bits, as are the places computed from it: there may be more than 2^31 values.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    place, inside = row * features + column, (row < num_rows) & (column < features)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.reduce(values * values, 1, _add) / features + eps)[:, None]
    if ROUNDS_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (normed * (scale + offset)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_output,
    x,
    weight,
    out,
    num_rows,
    features,
    eps,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    place, inside = row * features + column, (row < num_rows) & (column < features)
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + place, mask=inside, other=0.0).to(tl.float32) * (scale + offset)
    inverse = tl.rsqrt(tl.reduce(values * values, 1, _add) / features + eps)
    along = tl.reduce(values * grad, 1, _add) * (inverse * inverse) / features
    tl.store(out + place, ((grad - values * along[:, None]) * inverse[:, None]).to(out.dtype.element_ty), mask=inside)
