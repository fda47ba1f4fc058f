"""Quantizing weights to NF4 and back, in bitsandbytes' state format, with its kernels or a bit-identical fused one.

bitsandbytes imports torch's compiler, which takes a second and a half, so it is imported only where it is called.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from qlora.kernels import HAS_TRITON, LowRank, describe_failure, quantize_4bit_cpu
from qlora.kernels.dequantize import dequantize_4bit_plain, is_traced, tile_kind

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# Types of 4-bit codes, by bitsandbytes' name and by one of our own.
NF4, MXFP4 = "nf4", "mxfp4"
BLOCK_SIZE = 64
# In double quantization, the absmax values of this many blocks share a scale.
NESTED_BLOCK_SIZE = 256

# The kinds of weight, with their device, for which the fused kernel matched bitsandbytes bit for bit (each kind is
# compiled separately), and those for which it is not used, with the reason.
_verified: set[tuple[object, ...]] = set()
_rejected: dict[tuple[object, ...], str] = {}


def quantize(
    weight: torch.Tensor, double_quant: bool = True, block_size: int = BLOCK_SIZE
) -> tuple[torch.Tensor, "QuantState"]:
    """Quantize a weight to NF4 (QLoRA, arXiv:2305.14314, §3).

    Args:
        weight: (out, in), fp32, bf16 or fp16, of any size.
        double_quant: Quantize the blocks' absmax to 8 bits too.
        block_size: Number of weights that share one absmax.

    Returns:
        The packed codes, (ceil(out * in / 2), 1) uint8, and the state needed to dequantize them.
    """
    from bitsandbytes.functional import quantize_4bit

    if weight.device.type == "cpu" and weight.numel() % block_size == 0:
        return _quantize_cpu([weight], weight.shape, double_quant, block_size)
    kind = {"blocksize": block_size, "compress_statistics": double_quant, "quant_type": "nf4"}
    return quantize_4bit(weight.contiguous(), **kind)


def quantize_rows(
    blocks: Iterable[torch.Tensor], shape: Sequence[int], double_quant: bool = True, block_size: int = BLOCK_SIZE
) -> tuple[torch.Tensor, "QuantState"]:
    """Quantize a weight that is given in blocks of its rows; on a CPU, each while it is in the processor's cache.

    Args:
        blocks: The rows in order, (rows, in) each, of the same dtype.
        shape: (out, in).
        double_quant: See :func:`quantize`.
        block_size: See :func:`quantize`.

    Returns:
        What :func:`quantize` gives for the whole weight, bit for bit.

    Raises:
        ValueError: The blocks do not add up to the shape.
    """
    blocks = iter(blocks)
    first = next(blocks)
    if first.device.type != "cpu" or shape[-1] % block_size:
        return quantize(torch.cat([first, *blocks]), double_quant, block_size)
    return _quantize_cpu(chain([first], blocks), torch.Size(shape), double_quant, block_size)


def _quantize_cpu(
    blocks: Iterable[torch.Tensor], shape: torch.Size, double_quant: bool, block_size: int
) -> tuple[torch.Tensor, "QuantState"]:
    """Quantize a weight given in parts, each a whole number of blocks that share an absmax."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    code = get_4bit_type("nf4", device="cpu")
    packed = torch.empty(shape.numel() // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(shape.numel() // block_size, dtype=torch.float32, device="cpu")
    start, dtype = 0, None
    for block in blocks:
        end, dtype = start + block.numel(), block.dtype
        places = packed[start // 2 : end // 2], absmax[start // block_size : end // block_size]
        quantize_4bit_cpu(block, code, block_size, *places)
        start = end
    if start != shape.numel():
        raise ValueError(f"the blocks have {start:,} values, a weight of shape {tuple(shape)} has {shape.numel():,}")
    nested: dict[str, Any] = {}
    if double_quant:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        nested = {"offset": offset, "state2": state2}
    state = QuantState(absmax, shape, code, blocksize=block_size, quant_type="nf4", dtype=dtype, **nested)
    return packed.view(-1, 1), state


def dequantize(
    packed: torch.Tensor,
    state: "QuantState",
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    delta: LowRank | None = None,
) -> torch.Tensor:
    """Dequantize a weight, with one rounding from fp32 to `dtype`.

    Args:
        packed: The codes, uint8.
        state: The blocks' statistics.
        dtype: Dtype of the result: fp32, bf16 or fp16; it need not be the original one.
        out: A tensor, (out, in) in `dtype`, to write the result into.
        delta: Added to the weight in `dtype`, the dtype of its factors; the sum is rounded once more.

    Returns:
        The weight, (out, in).
    """
    properties = kind_of_kernel(packed, state.shape, state.blocksize, delta)
    kind = (packed.device, dtype, state.quant_type, state.nested, *properties)
    if kind in _verified:
        return _dequantize_fused(packed, state, dtype, out, delta)
    if kind in _rejected or _unfused_reason(packed.device) is not None or is_traced(packed):
        return _dequantize_bitsandbytes(packed, state, dtype, out, delta)
    # The first weight of its kind on this device is computed by both kernels, and bitsandbytes' result is returned.
    wanted = _dequantize_bitsandbytes(packed, state, dtype, out, delta)

    def is_same() -> bool:
        if delta is None:
            return same_bits(_dequantize_fused(packed, state, dtype), wanted)
        trial = random_delta(delta)  # B starts at zero and would hide a difference
        return is_close(
            _dequantize_fused(packed, state, dtype, delta=trial),
            _dequantize_bitsandbytes(packed, state, dtype, None, trial),
        )

    verify_kernel(kind, f"a {' × '.join(map(str, wanted.shape))} weight", is_same)
    return wanted


def dequantize_rows(packed: torch.Tensor, state: "QuantState", dtype: torch.dtype) -> Callable[[slice], torch.Tensor]:
    """Return a function that dequantizes some rows of a weight, bit-equal to those of :func:`dequantize`.

    Where a row is not a whole number of blocks, the weight is dequantized at once, and the function gives its rows.

    Args:
        packed: The codes.
        state: The blocks' statistics, which are dequantized at once.
        dtype: Dtype of the rows.
    """
    from bitsandbytes.functional import QuantState

    num_rows, columns = state.shape
    if columns % state.blocksize:
        return dequantize(packed, state, dtype).__getitem__
    absmax = _plain_absmax(state).view(num_rows, -1)
    codes = packed.view(torch.uint8).view(-1)[: num_rows * columns // 2].view(num_rows, -1)

    def read(rows: slice) -> torch.Tensor:
        own = codes[rows]
        settings = {"code": state.code, "blocksize": state.blocksize, "quant_type": state.quant_type}
        part = QuantState(absmax[rows].view(-1), torch.Size((len(own), columns)), dtype=state.dtype, **settings)
        return dequantize(own, part, dtype)

    return read


def verify_kernel(kind: tuple, name: str, is_same: Callable[[], bool]) -> bool:
    """Compare the fused kernel on the first weight of a kind, and return whether it is used for that kind.

    Args:
        kind: The properties that the kernel is compiled for, of which the first are device and dtype.
        name: What is compared, for the reason.
        is_same: Compares the kernel's result with the one that is known to be right. It is called for the first weight
            of a kind, and again after it ran out of memory.
    """
    device, dtype = kind[:2]
    if kind in _verified:
        return True
    if kind in _rejected or _unfused_reason(device) is not None:
        return False
    try:
        matches = is_same()
    except Exception as error:  # a kernel compiler can fail in any way, and bitsandbytes works without it
        _rejected[kind] = f"the fused kernel failed for {name} in {dtype}: {describe_failure(error)}"
        return False
    if matches:
        _verified.add(kind)
    else:
        _rejected[kind] = f"the fused kernel gave other bits for {name} in {dtype}"
    return matches


def dequantize_path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return which kernel :func:`dequantize` uses on a device in a dtype, and why.

    Returns:
        `fused kernel` or `bitsandbytes`, and the reason, which names any kinds of weight for which it is not used.
    """
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    reason = _unfused_reason(device)
    if reason is not None:
        return "bitsandbytes", reason
    failed = "; ".join(why for kind, why in _rejected.items() if kind[:2] == (device, dtype))
    if any(kind[:2] == (device, dtype) for kind in _verified):
        found = "it gave bitsandbytes' bits here"
        return "fused kernel", f"{found}; bitsandbytes for other kinds of weight: {failed}" if failed else found
    if failed:
        return "bitsandbytes", failed
    return "fused kernel", "if it gives bitsandbytes' bits for the first weight"


def kind_of_kernel(
    packed: torch.Tensor, shape: Sequence[int], block_size: int, delta: LowRank | None
) -> tuple[int | bool, ...]:
    """Return the properties of a weight and its LoRA term that the fused kernel is compiled for."""
    kind = (block_size, *tile_kind(packed, shape, block_size, delta is not None))
    if delta is None:
        return kind
    rank = delta.A.shape[-2]
    return (*kind, rank <= 16, rank % 8 == 0, delta.A.stride(-1) != 1)


def random_delta(delta: LowRank) -> LowRank:
    """Return a term of the same kind with random values, which are the same each time."""
    generator = torch.Generator().manual_seed(0)  # not the run's generator, which must not advance
    factors = [torch.randn(factor.shape, generator=generator) * 0.1 for factor in delta.tensors]
    # Of the same strides, for which the kernel is compiled.
    A, B = (torch.empty_like(own).copy_(values) for own, values in zip(delta.tensors, factors, strict=True))
    return LowRank(A, B, delta.scaling)


def _unfused_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "the fused kernel is for CUDA"
    if not HAS_TRITON:
        return "Triton is not installed"
    return None


def _dequantize_fused(
    packed: torch.Tensor,
    state: "QuantState",
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    delta: LowRank | None = None,
) -> torch.Tensor:
    from qlora.kernels.dequantize_triton import dequantize_4bit_triton

    options = _nested(state)
    if delta is not None:
        options |= {"lora_A": delta.A, "lora_B": delta.B, "scaling": delta.scaling}
    return dequantize_4bit_triton(
        packed, state.code, state.absmax, state.shape, dtype, block_size=state.blocksize, **options, out=out
    )


def _nested(state: "QuantState") -> dict[str, Any]:
    """Return what dequantizes a weight's absmax, as arguments; empty if that is not quantized."""
    if not state.nested:
        return {}
    return {
        "nested_code": state.state2.code,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset,
        "nested_block_size": state.state2.blocksize,
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits."""
    # Compared as integers, since -0 == 0 and NaN != NaN.
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.view(integers), other.view(integers))


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors differ at most as sums in two orders do."""
    # Sums in two orders may round to neighbouring numbers; a wrong one differs by more.
    return torch.allclose(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-6)


def _dequantize_bitsandbytes(
    packed: torch.Tensor,
    state: "QuantState",
    dtype: torch.dtype,
    out: torch.Tensor | None,
    delta: LowRank | None,
) -> torch.Tensor:
    weight = _dequantize_bitsandbytes_alone(packed, state, dtype, out)
    return weight if delta is None else delta.fold(weight, out=weight)


def _dequantize_bitsandbytes_alone(
    packed: torch.Tensor, state: "QuantState", dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    if state.quant_type == MXFP4:  # which bitsandbytes does not know
        return dequantize_4bit_plain(
            packed, state.code, state.absmax, state.shape, dtype, state.blocksize, **_nested(state), out=out
        )
    absmax = _plain_absmax(state)
    if packed.is_cuda:
        arguments = (packed, absmax, state.blocksize, state.quant_type, state.shape, dtype)
        if out is None or is_traced(packed):  # its check of `out` raises for any shape while it is traced
            weight = torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
            return weight if out is None else out.copy_(weight)
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        return out
    # As one row: blocks continue from row to row, which bitsandbytes' AVX-512 kernel gets wrong where a row is not a
    # whole number of blocks. On CPUs it has no `out`.
    flat = (1, state.shape.numel())
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, state.blocksize, state.quant_type, flat, dtype
    ).view(state.shape)
    return weight if out is None else out.copy_(weight)


def _plain_absmax(state: "QuantState") -> torch.Tensor:
    """Return the blocks' absmax in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def nf4_num_bytes(packed: torch.Tensor, state: "QuantState") -> int:
    """Return the bytes of a quantized weight, its statistics included."""
    return sum(tensor.nbytes for tensor in (packed, *statistics(state)))


def statistics(state: "QuantState") -> list[torch.Tensor]:
    """Return the tensors that dequantize the codes of a weight: the blocks' absmax, and what dequantizes these."""
    return [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


def set_statistics(state: "QuantState", tensors: Sequence[torch.Tensor]) -> None:
    """Use other tensors with the same values as :func:`statistics`, in its order."""
    state.absmax, *nested = tensors
    if nested:
        state.state2.absmax, state.offset = nested


def is_bitsandbytes_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is bitsandbytes' own 4-bit linear, as transformers puts it into a model."""
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)
