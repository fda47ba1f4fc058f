"""The kernel of :func:`qlora.kernels.rotary.rotate`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.tiles import num_tiles, row_tile

# Values of a half of a program's tile.
TILE = 1024
# Nothing is fused, so that sums and products round as torch's do.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def rotate_triton(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys in one launch, or their gradients back; see :func:`qlora.kernels.rotary.rotate`."""
    batch, length, num_queries, width = query.shape
    query, key, cos, sin = (tensor.contiguous() for tensor in (query, key, cos, sin))
    outputs = torch.empty_like(query), torch.empty_like(key)
    rows, columns = row_tile(width // 2, TILE)
    grid = (num_tiles(batch * length, rows), num_queries + key.shape[2])
    with torch.cuda.device_of(query):
        _rotary_kernel[grid](
            query, key, cos, sin, *outputs, batch * length, len(cos) * length, num_queries, key.shape[2], width // 2,
            BACKWARD=is_backward, ROWS=rows, COLUMNS=columns, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return outputs


@triton.jit
def _rotary_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as code.
    query,
    key,
    cos,
    sin,
    query_out,
    key_out,
    num_rows,
    num_angles,
    num_queries,
    num_keys,
    half,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # In 64 bits, as are the places computed from it: there may be more than 2^31 values.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column < half)
    head = tl.program_id(1)
    source, out, heads = query, query_out, num_queries
    if head >= num_queries:
        source, out, heads = key, key_out, num_keys
        head -= num_queries
    dtype = out.dtype.element_ty
    place = (row * heads + head) * (2 * half) + column
    angle = row % num_angles * (2 * half) + column
    first = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + place + half, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    kept_first = (first * cos_first).to(dtype).to(tl.float32)
    kept_second = (second * cos_second).to(dtype).to(tl.float32)
    if BACKWARD:
        rotated_first = kept_first + (second * sin_second).to(dtype).to(tl.float32)
        rotated_second = kept_second - (first * sin_first).to(dtype).to(tl.float32)
    else:
        rotated_first = kept_first - (second * sin_first).to(dtype).to(tl.float32)
        rotated_second = kept_second + (first * sin_second).to(dtype).to(tl.float32)
    tl.store(out + place, rotated_first.to(dtype), mask=inside)
    tl.store(out + place + half, rotated_second.to(dtype), mask=inside)
