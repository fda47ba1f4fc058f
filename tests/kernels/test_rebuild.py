"""Tensors rebuilt instead of saved: the same values and gradients, with less memory."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora.kernels import linear_cross_entropy, rebuilt
from qlora.lora import AdapterSpec, LoraLinear
from tests.reference.held import tensors_on_ctx


def gated(gate, up):
    return torch.nn.functional.silu(gate) * up


def saved_storages(build):
    """Return the storages saved for the backward, and the result."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = build()
    return set(kept), result


def test_values_and_gradients_are_those_of_the_function(generator):
    inputs = [torch.randn(5, 7, generator=generator, requires_grad=True) for _ in range(2)]
    grad = torch.randn(5, 7, generator=generator)
    plain, again = gated(*inputs), rebuilt(gated, *inputs)
    assert torch.equal(plain, again)
    expected = torch.autograd.grad(plain, inputs, grad)
    found = torch.autograd.grad(again, inputs, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Doubling:
    """A function with a gradient of its own: 5, which differs from autograd's."""

    def __call__(self, x):
        return 2 * x

    def gradients(self, grad_output, x):
        return (5 * grad_output,)


def test_a_function_that_knows_its_gradients_is_asked_for_them(generator):
    x = torch.randn(3, 4, generator=generator, requires_grad=True)
    result = rebuilt(Doubling(), x)
    assert torch.equal(result, 2 * x)
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], torch.full_like(x, 5))


def test_a_recipe_run_under_autograd_has_these_gradients_too(generator):
    x = torch.randn(3, 4, generator=generator, requires_grad=True)
    function = rebuilt(Doubling(), x).recipe.source.function
    assert torch.equal(torch.autograd.grad(function(x).sum(), x)[0], torch.full_like(x, 5))


def test_an_input_without_gradient_gets_none(generator):
    gate, up = torch.randn(5, generator=generator), torch.randn(5, generator=generator, requires_grad=True)
    rebuilt(gated, gate, up).sum().backward()
    assert gate.grad is None
    assert torch.equal(up.grad, torch.nn.functional.silu(gate))


def test_without_gradients_it_is_the_function_alone(generator):
    x = torch.randn(3, generator=generator)
    with torch.no_grad():
        assert not hasattr(rebuilt(gated, x, x), "recipe")


def layers(generator, count, features=6):
    built = []
    for _ in range(count):
        layer = LoraLinear(
            nn.Linear(features, 4, bias=False).requires_grad_(False),
            AdapterSpec(2, 4, init="gaussian", dtype=torch.float32),
        )
        layer.reset(generator)
        layer.lora_B.data.normal_(generator=generator)
        built.append(layer)
    return built


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["plain", "checkpoint", "twice"])
def test_adapters_get_the_gradients_that_they_get_from_a_kept_input(generator, count, how):
    adapters = layers(generator, count)
    inputs = [torch.randn(5, 6, generator=generator, requires_grad=True) for _ in range(2)]
    wanted = [*inputs, *(parameter for layer in adapters for parameter in (layer.lora_A, layer.lora_B))]

    def forward(function):
        x = function(*inputs)
        return sum((layer(x).square().sum() for layer in adapters), start=torch.zeros(()))

    expected = torch.autograd.grad(forward(gated), wanted)
    if how == "checkpoint":
        loss = checkpoint(lambda: forward(lambda *each: rebuilt(gated, *each)), use_reentrant=False)
    else:
        loss = forward(lambda *each: rebuilt(gated, *each))
    if how == "twice":
        torch.autograd.grad(loss, wanted, retain_graph=True)
    found = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_rebuilt_tensor_is_neither_saved_nor_on_the_graph(generator):
    adapters = layers(generator, 3)
    inputs = [torch.randn(5, 6, generator=generator, requires_grad=True) for _ in range(2)]

    def build():
        x = rebuilt(gated, *inputs)
        return x.untyped_storage().data_ptr(), [layer(x) for layer in adapters]

    kept, (built, outputs) = saved_storages(build)
    assert built not in kept
    assert {tensor.untyped_storage().data_ptr() for tensor in inputs} <= kept
    (node, _), *_ = outputs[0].grad_fn.next_functions  # the output is a view of what it gave
    assert built not in {tensor.untyped_storage().data_ptr() for tensor in tensors_on_ctx(node)}
    sum(output.sum() for output in outputs).backward()
    assert node.source._built is None


def test_an_adapter_after_another_operation_keeps_its_input_and_is_right(generator):
    (adapter,) = layers(generator, 1)
    inputs = [torch.randn(5, 6, generator=generator, requires_grad=True) for _ in range(2)]
    found = torch.autograd.grad(adapter(rebuilt(gated, *inputs) * 2).sum(), inputs)
    expected = torch.autograd.grad(adapter(gated(*inputs) * 2).sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_takes_the_last_norm_in_and_keeps_only_a_gradient(generator, weighted):
    norm = nn.RMSNorm(6).requires_grad_(False)
    norm.weight.data.normal_(generator=generator)
    head, labels = torch.randn(11, 6, generator=generator), torch.randint(11, (9,), generator=generator)
    weights = torch.rand(9, generator=generator) if weighted else None
    x = torch.randn(9, 6, generator=generator, requires_grad=True)
    plain = linear_cross_entropy(norm(x), head, labels, row_weights=weights, chunk_elements=33)
    fused = linear_cross_entropy(x, head, labels, row_weights=weights, norm=norm, chunk_elements=33)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)
    assert [tensor.shape for tensor in fused.grad_fn.saved_tensors if tensor is not None] == [x.shape]
    (expected,), (found,) = torch.autograd.grad(plain, x), torch.autograd.grad(fused, x)
    assert (found - expected).norm() < 1e-6 * expected.norm()
