"""The kernel of :func:`qlora.kernels.dequantize.dequantize_4bit_plain`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.dequantize import TILE_COLUMNS, tile_kind
from qlora.kernels.tiles import num_tiles

# Codes of a word of 32 bits, which are read together.
CODES = tl.constexpr(8)
# Rows of a tile: more where factors of 16 bits are added, so that more weights share what a program does once. Tiles of
# other kinds would then need more registers than there are.
TILE_ROWS, TILE_ROWS_OF_FOLD = 64, 128
# With fusion, code · absmax + offset would be one operation with one rounding, unlike bitsandbytes' absmax. The loop
# over ranks has one iteration or a few, and a pipeline of its loads costs more instructions than it saves time.
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


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
    total, tile_rows, tile_columns = shape[0] * shape[1], TILE_ROWS, min(TILE_COLUMNS, block_size)
    in_words, whole_tiles = tile_kind(packed, shape, block_size, lora_A is not None)
    if lora_A is None:
        # Blocks follow the flat order, so a weight of any shape can be read as rows of one tile each.
        rows, columns, rank = num_tiles(total, tile_columns), tile_columns, 0
        strides: tuple[int | None, ...] = (None,) * 6
        eights = False
    else:
        assert lora_B is not None
        (rows, columns), rank = shape, lora_A.shape[-2]
        if in_words and lora_A.dtype != torch.float32:
            tile_rows = TILE_ROWS_OF_FOLD
        eights = rank % 8 == 0 and lora_B.stride(-1) == 1 and lora_B.stride(-2) % 8 == 0
        of_stack = (0, 0) if index is None else (lora_A.stride(0), lora_B.stride(0))
        strides = *of_stack, *lora_A.stride()[-2:], *lora_B.stride()[-2:]
    grid = (num_tiles(rows, tile_rows) * num_tiles(columns, tile_columns), 1 if index is None else len(index))
    with torch.cuda.device_of(packed):
        _dequantize_kernel[grid](
            packed, code, absmax, nested_code, nested_absmax, nested_offset, lora_A, lora_B, index, out,
            columns, total, (total + 1) // 2, rank, scaling, *strides,
            BLOCK=block_size, NESTED_BLOCK=nested_block_size, IN_WORDS=in_words, WHOLE_TILES=whole_tiles,
            EIGHTS=eights, ROWS=tile_rows, COLUMNS=tile_columns, RANKS=16 if rank <= 16 else 32,
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
    IN_WORDS: tl.constexpr,  # Rows, or without the LoRA term all weights, are whole words of codes, and aligned.
    WHOLE_TILES: tl.constexpr,  # No row of a tile extends past the end, and so each lies within one block.
    EIGHTS: tl.constexpr,  # Rows of B are read in vectors of eight numbers.
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
    if lora_A is None:
        columns = COLUMNS
    elif IN_WORDS:
        columns = tl.multiple_of(columns, CODES)
    tiles = (columns + COLUMNS - 1) // COLUMNS
    first_column = tl.program_id(0) % tiles * COLUMNS
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    # The first weight of the tile and the weights from there, of which there may be more than 2^31. Places in the tile
    # are in 32 bits. The first one is even, so that it begins a byte.
    first = first_row * columns + first_column
    left = tl.minimum(total - first, 0x7FFFFFFF).to(tl.int32)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = row * columns + column
    # Masks are of whole rows where that is enough.
    inside = row * columns < left
    if not WHOLE_TILES:
        inside = (place < left) & (first_column + column < columns)

    # Loads first, so that they are under way while the LoRA term is computed.
    if IN_WORDS:
        words = (packed + first // 2).to(tl.pointer_type(tl.int32))
        of_row = tl.arange(0, COLUMNS // CODES)[None, :]
        inside_words = row * columns < left
        if not WHOLE_TILES:
            inside_words = (row * columns + of_row * CODES < left) & (first_column + of_row * CODES < columns)
            inside = tl.max_constancy(inside, (1, CODES))
        word = tl.load(words + (row * (columns // CODES) + of_row), mask=inside_words, other=0)
    else:
        byte = tl.load(packed + first // 2 + place // 2, mask=inside, other=0)

    # Weights that certainly share an absmax, which is dequantized once for them.
    SHARING: tl.constexpr = COLUMNS if WHOLE_TILES else (CODES if IN_WORDS else 1)
    begin = tl.arange(0, COLUMNS // SHARING)[None, :] * SHARING
    block = (first + row * columns + begin) // BLOCK
    inside_block = (row * columns + begin < left) & (first_column + begin < columns)
    largest = tl.load(absmax + block, mask=inside_block, other=0)
    if nested_code is not None:
        group = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside_block, other=0)
        largest = tl.load(nested_code + largest.to(tl.int32)) * group + tl.load(nested_offset)

    if lora_A is not None:
        lora_B += first_row * B_row_stride
        update = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for first_rank in range(0, rank, RANKS):
            ranks = first_rank + tl.arange(0, RANKS)
            inside_B = (row * columns < left) & (ranks[None, :] < rank)
            inside_A = (ranks[:, None] < rank) & (first_column + column < columns)
            of_B = row * B_row_stride + ranks[None, :] * B_rank_stride
            if EIGHTS:
                of_B, inside_B = tl.multiple_of(of_B, (8, 8)), tl.max_constancy(inside_B, (1, 8))
            B = tl.load(lora_B + of_B, mask=inside_B, other=0.0)
            of_A = ranks[:, None] * A_rank_stride + (first_column + column) * A_column_stride
            A = tl.load(lora_A + of_A, mask=inside_A, other=0.0)
            update = tl.dot(B, A, update, input_precision="ieee")

    # The table is read from shared memory, which a gather in one dimension puts it into. The codes of a word come
    # first among the dimensions, so that each thread has those of its own words.
    if IN_WORDS:
        # In a byte, the first code is in the high bits.
        shift = ((tl.arange(0, CODES) ^ 1) * 4)[:, None, None]
        codes = (tl.reshape(word, (1, ROWS * COLUMNS // 256, 32)) >> shift) & 15
    else:
        codes = tl.where(place % 2 == 0, byte >> 4, byte & 15).to(tl.int32)
    value = tl.gather(tl.load(code + tl.arange(0, 16)), tl.reshape(codes, (ROWS * COLUMNS,)), 0)
    if IN_WORDS:
        value = tl.permute(tl.reshape(value, (CODES, ROWS * COLUMNS // 256, 32)), (1, 2, 0))
    value = tl.reshape(value, (ROWS, COLUMNS))
    if not WHOLE_TILES:
        largest = tl.broadcast_to(largest[:, :, None], (ROWS, COLUMNS // SHARING, SHARING))
        largest = tl.reshape(largest, (ROWS, COLUMNS))
    weight = value * largest
    if lora_A is not None:
        weight = weight.to(out.dtype.element_ty).to(tl.float32) + scaling * update
    tl.store(out + first + place, weight.to(out.dtype.element_ty), mask=inside)
