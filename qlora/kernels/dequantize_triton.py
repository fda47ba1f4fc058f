"""The kernel of :func:`qlora.kernels.dequantize.dequantize_4bit_plain`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.dequantize import TILE_COLUMNS

TILE_ROWS = 64
# With fusion, code · absmax + offset would be one operation with one rounding, unlike bitsandbytes' absmax.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def dequantize_4bit_triton(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int = 64,
    *,
    nested_code: torch.Tensor | None = None,
    nested_absmax: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    nested_block_size: int = 256,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
    index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what :func:`dequantize_4bit_plain` does, in one kernel that reads each code and writes each weight once."""
    wanted = tuple(shape) if index is None else (len(index), *shape)
    if out is None:
        out = torch.empty(wanted, dtype=dtype, device=packed.device)
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == (wanted, dtype)
    total, tile_columns = shape[0] * shape[1], min(TILE_COLUMNS, block_size)
    num_bytes = (total + 1) // 2
    if lora_A is None:
        # Blocks follow the flat order, so a weight of any shape can be read as rows of one tile each.
        rows, columns, rank = triton.cdiv(total, tile_columns), tile_columns, 0
        strides: tuple[int | None, ...] = (None,) * 6
    else:
        assert lora_B is not None
        (rows, columns), rank = shape, lora_A.shape[-2]
        of_stack = (0, 0) if index is None else (lora_A.stride(0), lora_B.stride(0))
        strides = *of_stack, *lora_A.stride()[-2:], *lora_B.stride()[-2:]
    grid = (triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, tile_columns), 1 if index is None else len(index))
    with torch.cuda.device_of(packed):
        _dequantize_kernel[grid](
            packed, code, absmax, nested_code, nested_absmax, nested_offset, lora_A, lora_B, index, out,
            columns, total, num_bytes, rank, scaling, *strides,
            BLOCK=block_size, NESTED_BLOCK=nested_block_size,
            PAIRED=columns % 2 == 0, WHOLE_TILES=columns % tile_columns == 0,
            ROWS=TILE_ROWS, COLUMNS=tile_columns, RANKS=16 if rank <= 16 else 32,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


# Groups begin anywhere in the order of experts, and one compiled kernel is for all of them.
@triton.jit(do_not_specialize_on_alignment=["index"])
def _dequantize_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as code.
    packed,
    code,
    absmax,
    nested_code,
    nested_absmax,
    nested_offset,
    lora_A,
    lora_B,
    index,
    out,
    columns,
    total,
    num_bytes,
    rank,
    scaling,
    A_stride,
    B_stride,
    A_rank_stride,
    A_column_stride,
    B_row_stride,
    B_rank_stride,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    PAIRED: tl.constexpr,  # Both codes of a byte are in the same row.
    WHOLE_TILES: tl.constexpr,  # No tile extends past the last column, so each of its rows lies within one block.
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    if index is not None:
        slot = tl.program_id(1).to(tl.int64)
        chosen = tl.load(index + slot)
        blocks = (total + BLOCK - 1) // BLOCK
        out += slot * total
        packed += chosen * num_bytes
        absmax += chosen * blocks
        if nested_code is not None:
            nested_absmax += chosen * ((blocks + NESTED_BLOCK - 1) // NESTED_BLOCK)
            nested_offset += chosen
        if lora_A is not None:
            lora_A += chosen * A_stride
            lora_B += chosen * B_stride
    tiles = (columns + COLUMNS - 1) // COLUMNS
    first_column = tl.program_id(0) % tiles * COLUMNS
    # In 64 bits, as are the offsets computed from it: there may be more than 2^31 weights.
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    start = row * columns + first_column
    place = start + tl.arange(0, COLUMNS)[None, :]
    inside = place < total
    if not WHOLE_TILES:
        inside &= column < columns

    if PAIRED:
        half = tl.arange(0, COLUMNS // 2)[None, :]
        inside_half = start // 2 + half < num_bytes
        if not WHOLE_TILES:
            inside_half &= first_column + 2 * half < columns
        byte = tl.load(packed + (start // 2 + half), mask=inside_half, other=0)
        index = tl.reshape(tl.join(byte >> 4, byte & 15), (ROWS, COLUMNS))
    else:
        byte = tl.load(packed + place // 2, mask=inside, other=0)
        index = tl.where(place % 2 == 0, byte >> 4, byte & 15)

    block = (start if WHOLE_TILES else place) // BLOCK
    inside_block = block * BLOCK < total
    largest = tl.load(absmax + block, mask=inside_block, other=0)
    if nested_code is not None:
        group = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside_block, other=0)
        largest = tl.load(nested_code + largest.to(tl.int32)) * group + tl.load(nested_offset)
    weight = tl.load(code + index.to(tl.int32)) * largest

    if lora_A is not None:
        update = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for first_rank in range(0, rank, RANKS):
            ranks = first_rank + tl.arange(0, RANKS)
            inside_B = (row * columns < total) & (ranks[None, :] < rank)
            inside_A = (ranks[:, None] < rank) & (column < columns)
            B = tl.load(lora_B + row * B_row_stride + ranks[None, :] * B_rank_stride, mask=inside_B, other=0.0)
            A = tl.load(lora_A + ranks[:, None] * A_rank_stride + column * A_column_stride, mask=inside_A, other=0.0)
            update = tl.dot(B, A, update, input_precision="ieee")
        weight = weight.to(out.dtype.element_ty).to(tl.float32) + scaling * update
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=inside)
