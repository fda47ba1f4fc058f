"""Gated products: the bits of plain torch, values and gradients."""

from functools import partial

import pytest
import torch
from transformers.activations import ACT2FN

from qlora.kernels import ACTIVATIONS, GatedProduct, rebuilt
from tests.interpreted import interpret
from tests.reference.activations import gated, with_gradients

NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def random_inputs(dtype, generator):
    return [(3 * torch.randn(2, 33, 172, generator=generator)).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_plain_torchs_bit_for_bit(activation, dtype, generator):
    *inputs, grad = random_inputs(dtype, generator)
    before = [tensor.clone() for tensor in (*inputs, grad)]
    act_fn = ACT2FN[NAMES[activation]]
    expected = with_gradients(lambda gate, up: act_fn(gate) * up, inputs, grad, dtype)
    found = with_gradients(partial(rebuilt, GatedProduct(activation)), inputs, grad, dtype)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip((*inputs, grad), before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_they_are_those_of_the_formula(activation, generator):
    *inputs, grad = random_inputs(torch.float32, generator)
    expected = with_gradients(partial(gated, activation), inputs, grad, torch.float64)
    found = with_gradients(partial(rebuilt, GatedProduct(activation)), inputs, grad, torch.float32)
    assert all((one - other).norm() <= 1e-6 * other.norm() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # the interpreter rounds bf16 differently
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_give_the_same_but_for_last_bits(activation, dtype, overwrites, generator, monkeypatch):
    interpret(monkeypatch, "gated_triton")
    *inputs, grad = random_inputs(dtype, generator)
    fused = GatedProduct(activation, overwrites, fused=True)
    expected = with_gradients(partial(gated, activation), inputs, grad, torch.float64)
    plain = with_gradients(partial(rebuilt, GatedProduct(activation)), inputs, grad, dtype)
    given = grad.clone()
    found = fused(*inputs), *fused.gradients(given, *inputs)
    assert (found[2].data_ptr() == given.data_ptr()) == overwrites
    assert torch.equal(given, grad) != overwrites
    for one, other, exact in zip(found, plain, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - exact).norm() <= 1.01 * (other.double() - exact).norm() + 1e-6 * exact.norm()


def test_the_kernels_take_views_and_any_number_of_values(generator, monkeypatch):
    interpret(monkeypatch, "gated_triton")
    both = torch.randn(3, 5, 2 * 35, generator=generator)
    gate, up = both.chunk(2, dim=-1)
    grad = torch.ones(()).expand(3, 5, 35)
    plain, fused = GatedProduct("silu"), GatedProduct("silu", overwrites=True, fused=True)
    for found, wanted in zip(fused.gradients(grad, gate, up), plain.gradients(grad, gate, up), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.allclose(fused(gate, up), plain(gate, up), atol=1e-6)
    assert torch.equal(grad, torch.ones(3, 5, 35))


def test_an_input_without_gradient_gets_none(generator):
    gate, up, _ = random_inputs(torch.float32, generator)
    up.requires_grad_()
    rebuilt(GatedProduct("silu"), gate, up).sum().backward()
    assert gate.grad is None
    assert torch.equal(up.grad, torch.nn.functional.silu(gate))


@pytest.mark.parametrize("shape", [(7, 33), (2, 4, 512), (1, 1376)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_that_is_given_is_written_over_where_that_is_allowed(activation, shape, generator):
    grad, gate, up = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    wanted = GatedProduct(activation).gradients(grad.clone(), gate, up)
    given = grad.clone()
    found = GatedProduct(activation, overwrites=True).gradients(given, gate, up)
    assert all(map(torch.equal, found, wanted))
    assert found[1].data_ptr() == given.data_ptr()


def test_a_gradient_that_is_not_contiguous_is_left_alone(generator):
    gate, up = (torch.randn(4, 64, generator=generator) for _ in range(2))
    grad = torch.ones(()).expand(4, 64)
    found = GatedProduct("silu", overwrites=True).gradients(grad, gate, up)
    wanted = GatedProduct("silu").gradients(grad, gate, up)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(grad, torch.ones(4, 64))
