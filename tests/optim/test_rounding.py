"""Stochastic rounding: neighbours only, exact on average, and the update that nearest loses."""

import math

import pytest
import torch
from torch import nn

from qlora.optim import FlatParameters, make_optimizer, stochastic_round
from tests.reference import rounding as reference


def random_values(generator, size):
    """Return fp32 numbers of both signs over many orders of magnitude, including bf16's subnormals."""
    exponents = torch.randint(-130, 100, (size,), generator=generator)
    return torch.ldexp(torch.randn(size, generator=generator), exponents)


def test_a_value_goes_to_one_of_its_two_neighbours(generator):
    values = random_values(generator, 20_000)
    below, above = reference.neighbours(values)
    rounded = stochastic_round(values, generator)
    assert rounded.dtype == torch.bfloat16
    assert rounded.shape == values.shape
    up, down = rounded == above, rounded == below
    assert (up | down).all()
    assert (up & ~down).any()
    assert (down & ~up).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_expected_value_is_exact(sign, generator):
    draws = 4096
    values = sign * torch.rand(64, generator=generator).add(1e-3)
    wanted = reference.probability_up(values)
    _, above = reference.neighbours(values)
    rounded = stochastic_round(values.expand(draws, -1).contiguous(), generator)
    found = (rounded == above).double().mean(dim=0)
    sigma = (wanted * (1 - wanted) / draws).sqrt()
    # 64 values within 6 sigma each, and their sum within 6 of its own.
    assert ((found - wanted).abs() <= 6 * sigma + 1e-12).all()
    assert (found - wanted).sum().abs() <= 6 * sigma.square().sum().sqrt()


def test_it_rounds_up_as_often_as_the_reference(generator):
    values = torch.randn(200_000, generator=generator)
    _, above = reference.neighbours(values)
    ours = (stochastic_round(values, generator) == above).double().mean()
    theirs = (reference.stochastic_round(values, generator) == above).double().mean()
    assert (ours - theirs).abs() < 6 * math.sqrt(2 * 0.25 / len(values))


def test_values_that_bf16_holds_are_unchanged(generator):
    values = random_values(generator, 20_000).bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0, torch.finfo(torch.bfloat16).max])
    values = torch.cat([values, special.bfloat16()])
    rounded = stochastic_round(values.float(), generator)
    # Bits, because -0 equals 0.
    assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))


# CUDA's NaN has all bits set; a CPU's has the sign, or only the first bits of the mantissa.
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, -0x400000])
def test_nan_stays_nan(bits, generator):
    values = torch.full((4096,), bits, dtype=torch.int32).view(torch.float32)
    assert values.isnan().all()
    assert stochastic_round(values, generator).isnan().all()


def test_the_same_state_gives_the_same_result_and_then_moves_on(generator):
    values = torch.randn(5000, generator=generator)
    state = generator.get_state()
    first = stochastic_round(values, generator)
    second = stochastic_round(values, generator)
    generator.set_state(state)
    assert torch.equal(stochastic_round(values, generator), first)
    assert not torch.equal(first, second)


def test_the_values_given_are_left_alone(generator):
    values = torch.randn(500, generator=generator)
    before = values.clone()
    stochastic_round(values, generator)
    assert torch.equal(values, before)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_32bit"])
def test_nearest_loses_small_updates_and_the_others_keep_them(name, seed):
    # A constant gradient makes every update of AdamW the learning rate. bf16 has steps of 2^-8 below 1: 1e-4 is a
    # fortieth of one, so nearest never moves, and stochastic rounding moves one element in forty.
    size, steps, learning_rate = 4096, 50, 1e-4
    results = {}
    for rounding in ("stochastic", "master", "nearest"):
        parameter = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        flat = FlatParameters([("p", parameter)])
        optimizer = make_optimizer(name, flat, rounding=rounding, seed=seed)
        for _ in range(steps):
            flat.grad.fill_(1.0)
            optimizer.step(learning_rate)
        results[rounding] = parameter.detach()
        if rounding == "master":
            master = optimizer.state_dict()["master"]

    wanted = 1 - steps * learning_rate
    assert torch.equal(results["nearest"], torch.ones(size, dtype=torch.bfloat16))
    # One step's variance is at most update · spacing.
    sigma = math.sqrt(steps * learning_rate * 2.0**-8 / size)
    bias = 0.01 * steps * learning_rate if name == "adamw_8bit" else 1e-6
    assert abs(results["stochastic"].double().mean().item() - wanted) < 6 * sigma + bias
    assert abs(master.double().mean().item() - wanted) < bias + 1e-5
    assert torch.equal(results["master"], master.bfloat16())
    assert (results["master"] != 1).all()
