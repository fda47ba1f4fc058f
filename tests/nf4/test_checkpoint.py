"""4-bit weights in checkpoints: bitsandbytes' tensors, under its names, both ways."""

import json

import bitsandbytes
import pytest
import torch

from qlora.nf4 import (
    QUANT_STATE,
    checkpoint_layout,
    dequantize,
    from_checkpoint_tensors,
    quantize,
    statistics_by_weight,
    to_checkpoint_tensors,
)

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (33, 50)])
def test_a_checkpoint_of_bitsandbytes_is_read_and_left_whole(shape, double_quant, generator):
    weight = torch.randn(shape, generator=generator)
    layer = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=double_quant
    )
    layer.weight.data.copy_(weight)
    tensors = dict(layer.to("cpu").state_dict())
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    packed, state = from_checkpoint_tensors(tensors)

    assert torch.equal(
        dequantize(packed, state, torch.float32), dequantize(*quantize(weight, double_quant), torch.float32)
    )
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 128), (33, 50)])
def test_a_weight_is_stored_in_the_layout_announced_and_read_back(shape, double_quant, generator):
    packed, state = quantize(torch.randn(shape, generator=generator), double_quant)
    tensors = to_checkpoint_tensors(NAME, packed, state)
    layout = checkpoint_layout(NAME, shape[0] * shape[1], double_quant)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == layout
    assert json.loads(bytes(tensors[f"{NAME}{QUANT_STATE}nf4"].tolist()))["shape"] == list(shape)
    parts = {name.removeprefix(NAME.removesuffix("weight")): tensor for name, tensor in tensors.items()}
    found = dequantize(*from_checkpoint_tensors(parts), torch.float32)
    assert torch.equal(found, dequantize(packed, state, torch.float32))


@pytest.mark.parametrize("double_quant", [True, False])
def test_statistics_are_found_by_their_weight(double_quant):
    statistics = [*checkpoint_layout(NAME, 640, double_quant)][1:]
    others = ["model.norm.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight", "a.absmax"]
    assert statistics_by_weight([NAME, *others, *statistics]) == {NAME: statistics}
    assert statistics_by_weight(others) == {}
