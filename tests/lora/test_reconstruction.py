"""What quantization loses, made up for: bits, errors of all iterates, and the norm that they are measured in."""

import pytest
import torch

from qlora.lora.initial import Factors
from qlora.lora.reconstruction import SHRINKAGE, reconstruct, subtract
from qlora.nf4 import dequantize, quantize
from tests.reference.reconstruction import iterates, weighted_norm

OUT, IN, RANK = 48, 64, 5


def nf4(matrix):
    packed, state = quantize(matrix)
    return dequantize(packed, state, torch.bfloat16).float()


def weight_and_moment(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * torch.rand(OUT, IN, generator=generator).pow(3)
    x = torch.randn(400, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    x = x * torch.rand(IN, generator=generator).pow(2)
    return weight, x.T @ x / len(x)


def shrunk(moment):
    """Return a moment as the error is measured in."""
    return moment if moment is None or moment.dim() == 1 else torch.lerp(moment, moment.diag().diag(), SHRINKAGE)


MOMENTS = {"none": lambda moment: None, "diagonal": torch.diagonal, "full": lambda moment: moment}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("start", ["residual", "loftq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_best_iterate_of_the_slow_reference_is_kept(start, moment, dtype):
    weight, second_moment = weight_and_moment(0)
    given = MOMENTS[moment](second_moment)
    found = reconstruct(weight, RANK, 2.0, nf4, iterations=4, start=start, second_moment=given, dtype=dtype)
    plain, errors = iterates(weight, RANK, nf4, 4, start, shrunk(given), dtype)
    # Roundings of another order of operations can move a number over a border of NF4.
    assert found.error == pytest.approx(min(errors) / plain, rel=0.05)
    assert found.error < 1
    assert {factor.dtype for factor in (*found.initial, *found.subtracted)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kept_factors_reproduce_what_was_quantized(dtype):
    weight, moment = weight_and_moment(1)
    quantized = []

    def record(matrix):
        quantized.append(matrix.clone())
        return nf4(matrix)

    found = reconstruct(weight, RANK, 1.7, record, second_moment=moment, dtype=dtype)
    residual = subtract(weight, found.subtracted, 1.7)
    assert any(torch.equal(residual, matrix) for matrix in quantized)
    lost = weight - nf4(residual) - 1.7 * found.initial.B.float() @ found.initial.A.float()
    plain = weight - nf4(weight)
    wanted = weighted_norm(lost, shrunk(moment)) / weighted_norm(plain, shrunk(moment))
    assert found.error == pytest.approx(wanted, rel=1e-3)


def test_the_error_falls_with_iterations_and_rank():
    weight, moment = weight_and_moment(2)

    def error(rank, iterations):
        return reconstruct(weight, rank, 1.0, nf4, iterations=iterations, second_moment=moment).error

    by_iterations = [error(4, iterations) for iterations in (1, 2, 4, 8)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    by_rank = [error(rank, 3) for rank in (1, 4, 16, 48)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_a_moment_lowers_the_error_of_outputs():
    weight, moment = weight_and_moment(3)
    lost = {}
    for name, given in (("with", moment), ("without", None)):
        found = reconstruct(weight, RANK, 1.0, nf4, second_moment=given)
        base = nf4(subtract(weight, found.subtracted, 1.0))
        lost[name] = weighted_norm(weight - base - found.initial.B.float() @ found.initial.A.float(), moment)
    assert lost["with"] < 0.9 * lost["without"]


def test_loftq_of_one_iteration_leaves_the_base_as_it_is():
    weight, _ = weight_and_moment(4)
    found = reconstruct(weight, RANK, 1.0, nf4, iterations=1, start="loftq")
    assert torch.equal(subtract(weight, found.subtracted, 1.0), weight)


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_subtracting_gives_the_same_bits_in_any_blocks(block_rows):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(50, 300, generator=generator).to(torch.bfloat16)
    A, B = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((9, 300), (50, 9)))
    found = subtract(weight, Factors(A, B), 1 / 3, block_rows)
    assert torch.equal(found, subtract(weight, Factors(A, B), 1 / 3))
    order = torch.randperm(9, generator=generator)
    assert torch.equal(found, subtract(weight, Factors(A[order], B[:, order]), 1 / 3))
    wanted = weight.double() - 1 / 3 * B.double() @ A.double()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_weight_that_quantizes_exactly_has_no_error():
    found = reconstruct(torch.zeros(8, 64), 2, 1.0, nf4, start="loftq")
    assert found.error == 0
    assert all(factor.isfinite().all() for factor in (*found.initial, *found.subtracted))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "pissa"}, "start: 'pissa' should be one of residual, loftq"),
        ({"iterations": 0}, "iterations: 0 should be a whole number from 1"),
        ({"dtype": torch.float16}, "dtype: torch.float16 should be bfloat16 or float32"),
        ({"rank": 49}, "rank: 49 should be from 1 to 48"),
        ({"second_moment": torch.ones(63)}, r"second_moment: its shape \(63,\) should be \(64,\) or \(64, 64\)"),
        ({"second_moment": torch.zeros(64)}, "second_moment: it should be finite"),
        ({"second_moment": torch.eye(64) - 5 * torch.ones(64, 64) + 5 * torch.eye(64)}, "positive semidefinite"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(**{"weight": torch.randn(OUT, IN), "rank": 4, "scaling": 1.0, "quantize": nf4} | arguments)
