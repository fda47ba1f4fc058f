"""FP8 and MXFP4 weights decoded by rows: equal to a slow reference and to transformers' own decoders."""

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora.errors import ModelError
from qlora.files.fp8 import fp8_tensors
from qlora.files.headers import read_header
from qlora.files.mxfp4 import mxfp4_tensors
from tests.reference.encodings import from_fp8, from_mxfp4, to_fp8


def headers(tensors, folder):
    save_file(tensors, folder / "model.safetensors")
    return {folder / "model.safetensors": read_header(folder / "model.safetensors")}


def assert_read_by_rows(reader, name, expected):
    assert reader.shape(name) == tuple(expected.shape)
    assert reader.dtype(name) == expected.dtype
    assert torch.equal(reader.read(name), expected)
    for rows in (slice(0, 1), slice(1, 3), slice(expected.shape[0] - 1, None)):
        assert torch.equal(reader.read(name, rows), expected[rows]), rows


@pytest.mark.parametrize("shape", [(150, 40), (16, 8), (17, 9), (1, 33)])
def test_fp8_blocks_are_multiplied_by_their_scales(shape, tmp_path, generator):
    block = (16, 8)
    values, scales = to_fp8(torch.randn(shape, generator=generator), block)
    reader = fp8_tensors(headers({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path), block)
    assert list(reader) == ["a.weight"]
    assert_read_by_rows(reader, "a.weight", from_fp8(values, scales, block))
    if shape == (16, 8):
        theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
        assert torch.equal(reader.read("a.weight"), theirs)


@pytest.mark.parametrize("scale", [(), (1,), (24, 1), (24,)])
def test_one_scale_is_for_the_weight_or_for_a_row_of_it(scale, tmp_path, generator):
    values = torch.randn(24, 40, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(scale, generator=generator)
    others = {"a.input_scale": torch.ones(()), "a.bias": torch.randn(24, generator=generator).bfloat16()}
    others["a.qk_scale"] = torch.ones(3)  # a parameter of the model
    reader = fp8_tensors(headers({"a.weight": values, "a.weight_scale": scales, **others}, tmp_path))
    assert sorted(reader) == ["a.bias", "a.qk_scale", "a.weight"]
    assert_read_by_rows(reader, "a.weight", values.float() * (scales[:, None] if scale == (24,) else scales))
    assert torch.equal(reader.read("a.bias"), others["a.bias"])


def test_fp8_experts_have_grids_of_their_own(tmp_path, generator):
    block, weight = (16, 8), torch.randn(3, 20, 10, generator=generator)
    parts = [to_fp8(expert, block) for expert in weight]
    values, scales = (torch.stack([part[number] for part in parts]) for number in (0, 1))
    reader = fp8_tensors(headers({"gate_up_proj": values, "gate_up_proj_scale_inv": scales}, tmp_path), block)
    assert_read_by_rows(reader, "gate_up_proj", torch.stack([from_fp8(*part, block) for part in parts]))


def test_fp8_weights_without_their_scales_are_refused(tmp_path):
    values = torch.zeros(20, 10).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"a\.weight has no scale\. Use the same model in 16-bit safetensors"):
        fp8_tensors(headers({"a.weight": values}, tmp_path))
    with pytest.raises(ModelError, match=r"a\.weight is \(20, 10\), but its scales are \(3, 3\)"):
        fp8_tensors(headers({"a.weight": values, "a.weight_scale_inv": torch.ones(3, 3)}, tmp_path))


def test_mxfp4_is_decoded_to_what_transformers_gives(tmp_path, generator):
    blocks = torch.randint(0, 256, (4, 6, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (4, 6, 2), generator=generator, dtype=torch.uint8)
    scales[0, 0] = torch.tensor([0, 252])  # the ends of what bf16 represents
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales, "b": torch.ones(2)}
    reader = mxfp4_tensors(headers(tensors, tmp_path))
    assert sorted(reader) == ["b", "experts.down_proj"]
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert_read_by_rows(reader, "experts.down_proj", theirs)
    assert torch.equal(theirs.float(), from_mxfp4(blocks, scales))


def test_mxfp4_blocks_without_scales_are_refused(tmp_path):
    blocks = torch.zeros(4, 6, 2, 16, dtype=torch.uint8)
    for others in ({}, {"down_proj_scales": torch.zeros(4, 6, 3, dtype=torch.uint8)}):
        with pytest.raises(ModelError, match="down_proj_blocks has no _scales of its shape"):
            mxfp4_tensors(headers({"down_proj_blocks": blocks, **others}, tmp_path))
