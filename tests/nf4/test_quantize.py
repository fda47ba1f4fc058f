"""NF4 and back: equal to the paper's definition, for any shape and dtype."""

import math

import bitsandbytes
import pytest
import torch

from qlora.kernels.quantize import _bf16_table, _tables
from qlora.nf4 import (
    dequantize,
    dequantize_rows,
    is_bitsandbytes_linear,
    nf4_num_bytes,
    quantize,
    quantize_rows,
)
from tests.reference import nf4 as reference

# Whole blocks, then sizes that are no multiple of 64, of 32 or of 2.
SHAPES = [(128, 512), (172, 64), (64, 172), (33, 50), (7, 13), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape, generator, dtype=torch.float32):
    # The size of weights in a language model; rows of different scales give blocks of different absmax.
    scale = torch.rand(shape[0], 1, generator=generator) + 0.1
    return (torch.randn(shape, generator=generator) * scale * 0.02).to(dtype)


def codes_that_differ(weight, packed):
    """Return how many codes are not the nearest, without weights that sit on a boundary within fp32's rounding."""
    found, wanted = reference.unpack(packed, weight.numel()), reference.quantize(weight)
    scaled = weight.float().flatten() / reference.absmax_per_value(weight)
    boundaries = (reference.CODE[1:] + reference.CODE[:-1]) / 2
    on_boundary = (scaled[:, None] - boundaries).abs().amin(dim=1) < 1e-6
    return ((found != wanted) & ~on_boundary).sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_gets_the_nearest_code(shape, dtype, generator):
    weight = random_weight(shape, generator, dtype)
    packed, _ = quantize(weight, double_quant=False)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-weight.numel() // 2)
    assert codes_that_differ(weight, packed) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_double_quant_the_result_is_the_references_bit_for_bit(shape, dtype, generator):
    weight = random_weight(shape, generator, dtype)
    packed, state = quantize(weight, double_quant=False)
    codes = reference.unpack(packed, weight.numel())
    wanted = reference.dequantize(codes, reference.absmax_per_value(weight), weight.shape)
    assert torch.equal(dequantize(packed, state, torch.float32), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quant_moves_a_weight_no_more_than_its_bound(shape, generator):
    weight = random_weight(shape, generator)
    packed, state = quantize(weight, double_quant=True)
    plain = quantize(weight, double_quant=False)
    assert torch.equal(packed, plain[0])
    distance = (dequantize(packed, state, torch.float32) - dequantize(*plain, torch.float32)).abs()
    absmax = reference.absmax_per_value(weight)
    bound = torch.cat([part.expand(64) for part in reference.double_quant_bound(absmax[::64])[:, None]])[
        : weight.numel()
    ]
    # A code value is at most 1, and scales the error of its block.
    share = reference.CODE[reference.unpack(packed, weight.numel())].abs()
    assert (distance.flatten() <= share * bound).all()
    if weight.numel() > 64:
        assert distance.max() > 0, "the statistics were not quantized"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_dtype_is_one_rounding_of_the_fp32_result(shape, dtype, double_quant, generator):
    weight = random_weight(shape, generator, torch.bfloat16)
    packed, state = quantize(weight, double_quant)
    found = dequantize(packed, state, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dequantize(packed, state, torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 512), (33, 50), (7, 13)])
def test_out_is_written_in_place(shape, dtype, generator):
    packed, state = quantize(random_weight(shape, generator))
    out = torch.full(shape, float("nan"), dtype=dtype)
    address = out.data_ptr()
    result = dequantize(packed, state, dtype, out=out)
    assert result.data_ptr() == out.data_ptr() == address
    assert torch.equal(out, dequantize(packed, state, dtype))


def test_a_transposed_weight_is_quantized_by_its_values(generator):
    weight = random_weight((64, 96), generator)
    packed, state = quantize(weight.T, double_quant=False)
    copied, copied_state = quantize(weight.T.contiguous(), double_quant=False)
    assert torch.equal(packed, copied)
    assert torch.equal(dequantize(packed, state, torch.float32), dequantize(copied, copied_state, torch.float32))


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_block_of_zeros_stays_zero(double_quant, generator):
    weight = random_weight((16, 64), generator)
    weight[3] = 0
    restored = dequantize(*quantize(weight, double_quant), torch.float32)
    assert restored.isfinite().all()
    assert torch.equal(restored[3], torch.zeros(64))


@pytest.mark.parametrize("shape", [(1024, 1024), (172, 64)])
def test_bytes_are_codes_and_statistics_and_no_more(shape, generator):
    weight = random_weight(shape, generator)
    packed, state = quantize(weight)
    size, blocks = weight.numel(), -(-weight.numel() // 64)
    # 4 bits a weight, 8 a block, 32 for each 256 blocks, and the mean.
    assert nf4_num_bytes(packed, state) == size // 2 + blocks + 4 * -(-blocks // 256) + 4


def test_a_large_weight_costs_the_papers_bytes_per_parameter(generator):
    weight = random_weight((1024, 1024), generator, torch.bfloat16)
    assert nf4_num_bytes(*quantize(weight)) / weight.numel() == pytest.approx(0.516, abs=5e-4)
    # 32 bits a block without the second quantization.
    assert nf4_num_bytes(*quantize(weight, double_quant=False)) / weight.numel() == pytest.approx(0.5625)


def test_a_plain_linear_is_not_taken_for_bitsandbytes():
    assert not is_bitsandbytes_linear(torch.nn.Linear(2, 2))


def with_odd_values(weight, generator):
    """Return the weight with blocks on which search and lookup may differ: at and near boundaries, zero, tiny, huge."""
    blocks = weight.view(-1, 64)
    code = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    boundaries = (code[1:] + code[:-1]) / 2
    beside = [torch.nextafter(boundaries, torch.full((15,), end)) for end in (-math.inf, math.inf)]
    blocks[0] = torch.cat([code, boundaries, *beside, torch.tensor([1.0, -1.0, -0.0])])
    blocks[1] = blocks[0] * torch.rand(1, generator=generator)
    blocks[2], blocks[3], blocks[4] = 0, blocks[5] * 1e-38, blocks[5] * 1e30
    return weight


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("shape", "block_size"), [((64, 64), 64), ((100, 832), 128), ((832, 1024), 4096)])
def test_codes_and_statistics_are_bitsandbytes_bit_for_bit(
    shape, block_size, double_quant, dtype, is_finite, generator
):
    weight = with_odd_values(random_weight(shape, generator), generator).to(dtype)
    if not is_finite:
        weight[1, 3], weight[2, 5], weight[3, 7] = math.nan, math.inf, -math.inf
    packed, state = quantize(weight, double_quant, block_size)
    wanted, wanted_state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(packed, wanted)
    found, expected = state.as_dict(packed=True), wanted_state.as_dict(packed=True)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert (state.shape, state.dtype) == (wanted_state.shape, wanted_state.dtype)


@pytest.mark.parametrize("exponent", [62, 63, 120, 127, 128, 254])
def test_every_bf16_value_gets_bitsandbytes_code_below_every_absmax(exponent):
    def from_bits(first, end):
        return torch.arange(first, end, dtype=torch.int16).view(torch.bfloat16)

    absmax, values = from_bits(exponent << 7, (exponent + 1) << 7), from_bits((exponent - 8) << 7, (exponent + 1) << 7)
    values = torch.cat([values, -values])
    blocks = torch.minimum(values.repeat(128, 1), absmax[:, None]).maximum(-absmax[:, None]).view(-1, 32)
    weight = torch.cat([absmax.repeat_interleave(len(values) // 32)[:, None].expand(-1, 32), blocks], dim=1)
    packed, state = quantize(weight, double_quant=False)
    wanted, wanted_state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, wanted)
    assert torch.equal(state.absmax, wanted_state.absmax)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(70, 192), (172, 64), (64, 172), (33, 50)])
def test_rows_are_quantized_and_dequantized_as_the_whole_weight(shape, double_quant, generator):
    weight = random_weight(shape, generator, torch.bfloat16)
    wanted = quantize(weight, double_quant)
    packed, state = quantize_rows(weight.split(9), shape, double_quant)
    assert torch.equal(packed, wanted[0])
    assert (state.shape, state.dtype) == (weight.shape, weight.dtype)
    for name, tensor in state.as_dict(packed=True).items():
        assert torch.equal(tensor, wanted[1].as_dict(packed=True)[name]), name
    whole, read = dequantize(*wanted, torch.float16), dequantize_rows(packed, state, torch.float16)
    for rows in (slice(0, 9), slice(9, 18), slice(31, None)):
        assert torch.equal(read(rows), whole[rows])
    if shape[-1] % 64 == 0:
        with pytest.raises(ValueError, match="the blocks have"):
            quantize_rows(weight[9:].split(9), shape, double_quant)


@pytest.mark.parametrize("first_in", [torch.float32, torch.bfloat16])
def test_defaults_of_the_first_call_do_not_change_later_ones(first_in, generator):
    weight = torch.randn(64, 64, generator=generator).to(first_in)
    wanted, _ = quantize(weight, double_quant=False)
    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
        _tables.cache_clear()
        _bf16_table.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                quantize(weight, double_quant=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(quantize(weight, double_quant=False)[0], wanted)
