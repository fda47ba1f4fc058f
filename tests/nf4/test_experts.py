"""NF4Experts: each expert is a weight of its own."""

import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from qlora.kernels import ExpertGroup, LowRank, dequantize_4bit_plain
from qlora.nf4 import NF4Experts, dequantize, dequantize_path, quantize

# The package exports a function under this name.
door = sys.modules["qlora.nf4.quantize"]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 33, 50)], ids=str)
def test_an_expert_is_quantized_like_a_weight_of_its_own(shape, double_quant, generator):
    scales = 10.0 ** torch.arange(shape[0])
    weight = torch.randn(shape, generator=generator) * scales.view(-1, 1, 1)
    experts = NF4Experts.from_weight(weight, double_quant)
    assert experts.num_experts == shape[0]
    for expert in range(shape[0]):
        packed, state = quantize(weight[expert], double_quant)
        expected = dequantize(packed, state, torch.float32)
        assert torch.equal(experts.dequantize(expert, torch.float32), expected)
        error = (expected - weight[expert]).norm() / weight[expert].norm()
        assert error < 0.11


def test_the_statistics_are_saved_and_keep_their_dtype(generator):
    one, other = (NF4Experts.from_weight(torch.randn(2, 16, 32, generator=generator)) for _ in range(2))
    expected = one.dequantize(1, torch.float32)
    assert torch.equal(deepcopy(one).to(torch.bfloat16).dequantize(1, torch.float32), expected)
    assert not torch.equal(other.dequantize(1, torch.float32), expected)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.dequantize(1, torch.float32), expected)
    with pytest.raises(ValueError, match="other weights"):
        NF4Experts.from_weight(torch.randn(3, 16, 32), double_quant=False).set_extra_state(one.get_extra_state())


@pytest.mark.parametrize("experts", [[1], [1, 2], [0, 2]], ids=str)
def test_cached_weights_give_the_same_bits(experts, generator):
    stack = NF4Experts.from_weight(torch.randn(3, 16, 32, generator=generator))
    update = LowRank(torch.randn(3, 2, 32, generator=generator), torch.randn(3, 16, 2, generator=generator), 0.5)
    group = ExpertGroup(experts, [*range(len(experts) + 1)], torch.tensor(experts), torch.arange(4))
    plain, adapted = (stack.weights_for_product(group, torch.float32, each).clone() for each in (None, update))
    stack.cache_weight(torch.float32)
    codes = stack.weight.data.clone()
    stack.weight.data.zero_()  # which the cache does not read
    assert torch.equal(stack.weights_for_product(group, torch.float32), plain)
    assert torch.equal(stack.weights_for_product(group, torch.float32, update), adapted)
    assert torch.equal(stack.weights_for_product(group, torch.float32), plain)
    stack.weight.data.copy_(codes)
    stack.uncache_weight()
    assert not stack.is_cached
    assert torch.equal(stack.weights_for_product(group, torch.float32, update), adapted)


@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("is_right", [True, False])
def test_a_group_is_dequantized_at_once_where_that_gives_the_same(is_right, with_update, generator, monkeypatch):
    stack, calls = NF4Experts.from_weight(torch.randn(4, 16, 32, generator=generator)), []
    update = None
    if with_update:
        update = LowRank(torch.randn(4, 2, 32, generator=generator), torch.zeros(4, 16, 2), 0.5)
    group = ExpertGroup([0, 1, 3], [0, 1, 2, 3], torch.tensor([0, 1, 3]), torch.tensor([0, 1, 2, 2, 3]))
    expected = stack.weights_for_product(group, torch.float32, update).clone()

    def kernel(*args, index=None, out=None, **options):
        calls.append(None if index is None else index.tolist())
        found = dequantize_4bit_plain(*args, index=index, out=out, **options)
        return found if is_right or index is None else found.add_(1)

    monkeypatch.setitem(sys.modules, "qlora.kernels.dequantize_triton", SimpleNamespace(dequantize_4bit_triton=kernel))
    monkeypatch.setattr(door, "_verified", set())
    monkeypatch.setattr(door, "_rejected", {})
    monkeypatch.setattr(door, "_unfused_reason", lambda device: None)
    for _ in range(2):
        found = stack.weights_for_product(group, torch.float32, update)
        assert torch.allclose(found, expected, atol=1e-6)
    at_once = [index for index in calls if index is not None]
    assert at_once == ([[0, 1], [0, 1, 3], [0, 1, 3]] if is_right else [[0, 1]])
    path = ": ".join(dequantize_path(stack.device, torch.float32))
    assert path.startswith("fused kernel: it gave bitsandbytes' bits here")  # also for single experts
    assert is_right or path.endswith(
        "bitsandbytes for other kinds of weight: the fused kernel gave other bits for experts of 4 × 16 × 32 in "
        "torch.float32"
    )
