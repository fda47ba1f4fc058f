"""Deltas: folded, added and differentiated as the product of their factors, one and several."""

import pytest
import torch

from qlora.kernels import LowRank, fold

OUT, IN, TOKENS = 33, 50, 6


def term(generator, rank, scaling, dtype=torch.float64):
    A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, IN), (OUT, rank)))
    return LowRank(A, B, scaling)


def matrix(delta):
    return delta.scaling * delta.B @ delta.A


@pytest.fixture
def terms(generator):
    return [term(generator, 4, 2.0), term(generator, 3, -0.7)]


@pytest.fixture
def weight(generator):
    return torch.randn(OUT, IN, generator=generator).double()


def test_the_effective_weight_is_the_sum_by_rows_transposed_or_in_place(terms, weight, generator):
    wanted, kept = weight + matrix(terms[0]) + matrix(terms[1]), weight.clone()
    assert torch.allclose(fold(weight, terms), wanted, rtol=1e-12)
    rows = slice(5, 17)
    assert torch.allclose(fold(weight[rows], [delta.rows(rows) for delta in terms]), wanted[rows], rtol=1e-12)
    assert torch.allclose(fold(weight.T, [delta.T for delta in terms]), wanted.T, rtol=1e-12)
    out = torch.empty_like(weight)
    assert fold(weight, terms, out) is out
    assert torch.allclose(out, wanted, rtol=1e-12)
    assert torch.equal(weight, kept)
    assert fold(weight, []) is weight
    assert fold(weight, terms, out=weight) is weight
    assert torch.allclose(weight, wanted, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_are_autograds(masked, terms, generator):
    delta = terms[1]
    x, grad = (
        torch.randn(TOKENS, IN, generator=generator).double(),
        torch.randn(TOKENS, OUT, generator=generator).double(),
    )
    mask = (torch.rand(TOKENS, IN, generator=generator) > 0.5).double() * 2 if masked else None
    inputs = [tensor.clone().requires_grad_() for tensor in (x, delta.A, delta.B)]
    dropped = inputs[0] if mask is None else inputs[0] * mask
    wanted = torch.autograd.grad(delta.scaling * dropped @ inputs[1].T @ inputs[2].T, inputs, grad)
    share = torch.ones_like(x)
    found = delta.gradients(x, grad, grad_x=share, mask=mask)
    for ours, theirs in zip((share - 1, *found), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)
    assert [one is None for one in delta.gradients(x, grad, (False, True))] == [True, False]
    assert [one is None for one in delta.gradients(x, grad, (True, False))] == [False, True]
    y = torch.ones(TOKENS, OUT, dtype=torch.float64)
    delta.add_output_(y, x)
    assert torch.allclose(y - 1, x @ matrix(delta).T, rtol=1e-10)
