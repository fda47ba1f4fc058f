"""The flat buffer: parameters and gradients are views of it, and behave as without it."""

import pytest
import torch
from torch import nn

from qlora.optim import FlatParameters, make_optimizer
from qlora.optim.flat import ALIGNMENT

# Smaller than a block, odd, a whole block, and one more.
SHAPES = [(3, 5), (7,), (16, 16), (257,), (1,)]
DTYPES = [torch.float32, torch.bfloat16]


def make_parameters(generator, dtype=torch.float32):
    return [
        (f"p{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for i, shape in enumerate(SHAPES)
    ]


def element_offset(tensor, buffer):
    return (tensor.data_ptr() - buffer.data_ptr()) // buffer.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_names_and_shapes_survive_the_move(dtype, generator):
    named = make_parameters(generator, dtype)
    before = [parameter.detach().clone() for _, parameter in named]
    flat = FlatParameters(named)
    assert flat.names == [name for name, _ in named]
    assert flat.num_parameters == sum(tensor.numel() for tensor in before)
    assert flat.data.dtype == dtype
    for (_, parameter), old in zip(named, before, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_in_the_buffer_is_a_change_in_the_parameters_and_the_other_way_round(dtype, generator):
    named = make_parameters(generator, dtype)
    flat = FlatParameters(named)
    before = [parameter.detach().clone() for _, parameter in named]
    flat.data.mul_(2)
    assert all(torch.equal(parameter, 2 * old) for (_, parameter), old in zip(named, before, strict=True))
    flat.data.zero_()
    with torch.no_grad():
        named[3][1].fill_(3)
    assert flat.data.count_nonzero() == named[3][1].numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_two_parameters_share_a_block_of_8_bit_state(dtype, generator):
    named = make_parameters(generator, dtype)
    flat = FlatParameters(named)
    blocks = []
    for _, parameter in named:
        start = element_offset(parameter, flat.data)
        assert element_offset(parameter.grad, flat.grad) == start
        blocks.append(set(range(start // ALIGNMENT, (start + parameter.numel() - 1) // ALIGNMENT + 1)))
    assert sum(map(len, blocks)) == len(set.union(*blocks))
    assert flat.data.numel() % ALIGNMENT == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_two_backward_passes_add_up_in_fp32_in_the_buffer(dtype, generator):
    named = make_parameters(generator, dtype)
    flat = FlatParameters(named)
    inputs = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(2)]
    for step in inputs:
        sum((x * parameter).float().sum() for x, (_, parameter) in zip(step, named, strict=True)).backward()
    for (_, parameter), first, second in zip(named, *inputs, strict=True):
        assert parameter.grad.dtype == torch.float32
        # In bf16 the sum would be rounded, and differ.
        assert torch.equal(parameter.grad, first.float() + second.float())
        start = element_offset(parameter.grad, flat.grad)
        assert torch.equal(flat.grad[start : start + parameter.numel()], parameter.grad.flatten())


def test_a_small_gradient_survives_next_to_a_large_one(generator):
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    flat = FlatParameters([("p", parameter)])
    for size in [1.0] + [2.0**-10] * 8:
        (parameter * size).sum().backward()
    assert torch.equal(flat.grad[:4], torch.full((4,), 1 + 8 * 2.0**-10))


def test_zero_grad_works_even_after_a_gradient_was_set_to_none(generator):
    named = make_parameters(generator)
    flat = FlatParameters(named)
    for _, parameter in named:
        parameter.square().sum().backward()
    assert flat.grad.count_nonzero() > 0
    named[0][1].grad = None
    flat.zero_grad()
    assert flat.grad.count_nonzero() == 0
    named[0][1].sum().backward()
    assert flat.grad.sum().item() == named[0][1].numel()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(max_norm, generator):
    named = make_parameters(generator)
    flat = FlatParameters(named)
    others = []
    for _, parameter in named:
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        others.append(nn.Parameter(parameter.detach().clone()))
        others[-1].grad = parameter.grad.clone()
    wanted = nn.utils.clip_grad_norm_(others, max_norm)
    norm = flat.clip_grad_norm(max_norm)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (_, parameter), other in zip(named, others, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=0)


def test_without_a_limit_the_norm_is_returned_and_the_gradient_unchanged(generator):
    flat = FlatParameters(make_parameters(generator))
    flat.grad.normal_(generator=generator)
    before = flat.grad.clone()
    assert flat.clip_grad_norm(None).item() == pytest.approx(before.norm().item(), rel=1e-6)
    assert torch.equal(flat.grad, before)


def test_clipping_shows_a_gradient_that_is_not_finite(generator):
    flat = FlatParameters(make_parameters(generator))
    flat.grad[0] = float("nan")
    assert not flat.clip_grad_norm(1.0).isfinite()


@pytest.mark.parametrize("rounding", ["stochastic", "master", "nearest"])
@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_32bit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_stays_zero_and_every_element_moves(dtype, name, rounding, generator):
    named = make_parameters(generator, dtype)
    flat = FlatParameters(named)
    before = [parameter.detach().clone() for _, parameter in named]
    directions = [torch.randn(old.shape, generator=generator).sign() for old in before]
    optimizer = make_optimizer(name, flat, weight_decay=0.1, rounding=rounding)
    learning_rate, steps = 0.1, 3
    for _ in range(steps):
        flat.zero_grad()
        for (_, parameter), direction in zip(named, directions, strict=True):
            parameter.grad.copy_(direction)
        optimizer.step(learning_rate)
    padding = torch.ones(flat.data.numel(), dtype=torch.bool)
    for _, parameter in named:
        start = element_offset(parameter, flat.data)
        padding[start : start + parameter.numel()] = False
    assert padding.sum() == flat.data.numel() - flat.num_parameters
    # bitsandbytes' 8-bit code on CPUs is looked up in a table that has no entry for exactly zero: a share of 2e-5 of
    # the block's largest moment is left, and moves what has no gradient by a little.
    bound = 0.01 * learning_rate * steps if name == "adamw_8bit" else 0
    assert flat.data[padding].abs().max() <= bound
    for (_, parameter), old, direction in zip(named, before, directions, strict=True):
        assert torch.equal((parameter - old).sign(), -direction)
