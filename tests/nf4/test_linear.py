"""NF4Linear: the product with the dequantized weight, without saving or changing anything."""

import copy

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora.nf4 import NF4Linear, dequantize, from_checkpoint_tensors
from tests.reference.held import saved_tensors, tensors_on_ctx

DTYPES = [torch.float32, torch.bfloat16]
# (out, in); the second is no multiple of 64 or 32, the third has an odd number of inputs.
SHAPES = [(96, 64), (33, 50), (7, 13)]


def random_nf4(shape, generator, dtype=torch.float32, bias=True, double_quant=True):
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return NF4Linear.from_linear(linear, double_quant)


def contents(layer):
    """Return a copy of every tensor of the weight."""
    state = layer.quant_state
    tensors = {"weight": layer.weight, "absmax": state.absmax, "code": state.code}
    if state.nested:
        tensors |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_unchanged(layer, before):
    after = contents(layer)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_product_with_the_dequantized_weight_bit_for_bit(shape, dtype, bias, generator):
    layer = random_nf4(shape, generator, dtype, bias)
    for lead in [(5,), (2, 3), ()]:
        x = torch.randn(*lead, shape[1], generator=generator).to(dtype)
        assert torch.equal(layer(x), F.linear(x, layer.dequantize(dtype), layer.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_x_is_the_one_autograd_gives_for_the_dequantized_weight(shape, dtype, generator):
    layer = random_nf4(shape, generator, dtype)
    x = torch.randn(2, 3, shape[1], generator=generator).to(dtype).requires_grad_()
    grad_output = torch.randn(2, 3, shape[0], generator=generator).to(dtype)
    (found,) = torch.autograd.grad(layer(x), x, grad_output)
    (wanted,) = torch.autograd.grad(F.linear(x, layer.dequantize(dtype), layer.bias), x, grad_output)
    assert torch.equal(found, wanted)


def test_forward_keeps_no_tensor_for_backward(generator):
    layer = random_nf4((64, 96), generator)
    x = torch.randn(8, 96, generator=generator, requires_grad=True)
    y, saved = saved_tensors(lambda: layer(x))
    assert saved == []
    # ctx refers to the layer with its codes and statistics: no floating tensor in it is as large as the smallest of
    # x, y and the weight.
    hanging = tensors_on_ctx(y.grad_fn)
    assert any(tensor is layer.weight for tensor in hanging), "the walk did not reach the layer"
    smallest = min(x.numel(), y.numel(), 64 * 96)
    assert [t.shape for t in hanging if t.is_floating_point() and t.numel() >= smallest] == []


def test_weight_and_bias_ask_for_no_gradient(generator):
    layer = random_nf4((32, 48), generator)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer(torch.randn(2, 48, generator=generator)).requires_grad


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_and_evaluation_leave_the_weight_as_it_was(shape, dtype, double_quant, generator):
    layer = random_nf4(shape, generator, dtype, double_quant=double_quant)
    before = contents(layer)
    x = torch.randn(4, shape[1], generator=generator).to(dtype).requires_grad_()

    layer.train()
    first = layer(x)
    first.float().square().sum().backward()
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
    layer.train()
    again = layer(x)
    grad, x.grad = x.grad, None
    again.float().square().sum().backward()

    assert torch.equal(evaluated, first)
    assert torch.equal(again, first)
    assert torch.equal(x.grad, grad)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to("cpu"),
        lambda module: module.half(),
        lambda module: module.float(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.double(),
    ],
    ids=["to-cpu", "half", "float", "to-bfloat16", "double"],
)
def test_casting_the_model_leaves_codes_and_statistics_as_they_were(move, double_quant, generator):
    layer = random_nf4((33, 50), generator, double_quant=double_quant)
    before, weight = contents(layer), layer.dequantize(torch.float32)
    # As part of a model, which is how it happens.
    move(nn.Sequential(layer, nn.LayerNorm(33)))
    assert_unchanged(layer, before)
    assert torch.equal(layer.dequantize(torch.float32), weight)


def test_the_bias_follows_a_cast(generator):
    layer = random_nf4((33, 50), generator).to(torch.bfloat16)
    x = torch.randn(3, 50, generator=generator).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.dequantize(torch.bfloat16), layer.bias))


def test_dequantize_writes_into_out(generator):
    layer = random_nf4((33, 50), generator)
    out = torch.full((33, 50), float("nan"), dtype=torch.bfloat16)
    assert layer.dequantize(torch.bfloat16, out=out) is out
    assert torch.equal(out, layer.dequantize(torch.bfloat16))


def test_a_copy_is_independent_and_equal(generator):
    layer = random_nf4((33, 50), generator)
    other = copy.deepcopy(layer)
    assert torch.equal(other.dequantize(torch.float32), layer.dequantize(torch.float32))
    assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_bitsandbytes_linear_is_taken_over_without_copying(generator):
    source = bitsandbytes.nn.Linear4bit(64, 96, bias=True, quant_type="nf4", compress_statistics=True)
    source.weight.data.copy_(torch.randn(96, 64, generator=generator) * 0.1)
    source = source.to("cpu")
    wanted = bitsandbytes.functional.dequantize_4bit(source.weight, source.weight.quant_state)

    layer = NF4Linear.from_linear(source)

    assert layer.weight.data_ptr() == source.weight.data_ptr()
    assert type(layer.weight) is nn.Parameter
    assert torch.equal(layer.dequantize(torch.float32), wanted)
    assert torch.equal(layer.bias, source.bias)


def test_all_tensors_that_a_layer_holds_are_counted(generator):
    layer = random_nf4((256, 512), generator, bias=False)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_on_ctx(layer)}
    # Besides: the code tables, 16 and 256 fp32 values.
    assert layer.num_bytes <= sum(held.values()) <= layer.num_bytes + 4 * (16 + 256)


def test_a_state_dict_holds_what_undoes_the_codes(generator):
    linear = torch.nn.Linear(172, 64)
    torch.nn.init.normal_(linear.weight, generator=generator)
    layer = NF4Linear.from_linear(linear)
    state = layer.state_dict()
    parts = {name: tensor for name, tensor in state.items() if name.startswith("weight")}
    assert torch.equal(dequantize(*from_checkpoint_tensors(parts), torch.float32), layer.dequantize(torch.float32))
    assert torch.equal(state["bias"], linear.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_loads_back_bit_for_bit(assign, double_quant, bias, generator):
    source, other = (
        nn.Sequential(random_nf4((33, 50), generator, torch.bfloat16, bias, double_quant)) for _ in range(2)
    )
    x = torch.randn(3, 50, generator=generator).bfloat16()
    other[0].cache_weight(torch.bfloat16)
    assert not torch.equal(other(x), source(x))
    assert (
        str(other.load_state_dict(source.state_dict(), strict=True, assign=assign)) == "<All keys matched successfully>"
    )
    assert torch.equal(other(x), source(x))
    assert_unchanged(other[0], contents(source[0]))
    assert other[0].quant_state.absmax.data_ptr() != source[0].quant_state.absmax.data_ptr()
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_a_state_dict_with_other_sizes_or_without_statistics_is_refused_by_torchs_list(generator):
    layer = random_nf4((33, 50), generator)
    state, before = layer.state_dict(), contents(layer)
    for lost in [name for name in state if name != "bias"]:
        with pytest.raises(RuntimeError, match=rf'(?s)Missing key\(s\) in state_dict: "{lost}"'):
            layer.load_state_dict({name: tensor for name, tensor in state.items() if name != lost})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight\.other"'):
        layer.load_state_dict({**state, "weight.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"(?s)size mismatch for weight:.*size mismatch for weight\.absmax:"):
        layer.load_state_dict(random_nf4((70, 50), generator).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: the checkpoint has \(50, 33\)"):
        layer.load_state_dict({**random_nf4((50, 33), generator).state_dict(), "bias": layer.bias})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight\.nested_absmax"'):
        layer.load_state_dict(random_nf4((33, 50), generator, double_quant=False).state_dict())
    layer.load_state_dict(state)
    assert {name: tensor.dtype for name, tensor in contents(layer).items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
