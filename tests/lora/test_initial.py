"""Initial values from shapes and weights: orthonormal rows, principal parts against the full SVD."""

import pytest
import torch

from qlora.lora import initial
from qlora.lora.initial import orthogonal, pissa, truncated_svd


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rank", "width"), [(1, 1), (1, 50), (8, 50), (50, 50)])
def test_rows_are_orthonormal(rank, width):
    A = orthogonal(rank, width, generator())
    assert A.shape == (rank, width)
    torch.testing.assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-6)


def test_directions_have_no_preference():
    rows = torch.stack([orthogonal(2, 4, generator(seed)) for seed in range(2000)])
    assert rows.mean(0).abs().max() < 0.06  # 5 deviations of a mean of 2000, each number having deviation 1/2
    torch.testing.assert_close(rows.square().mean(0), torch.full((2, 4), 1 / 4), rtol=0, atol=0.03)


def test_more_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="rank: 5 rows of 4 numbers can't be orthogonal"):
        orthogonal(5, 4, generator())


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_pissa_is_the_principal_part_with_equal_roots_on_both_sides(shape, scaling):
    weight = torch.randn(shape, generator=generator(1))
    A, B = pissa(weight.to(torch.bfloat16), 6, scaling)
    U, S, Vh = torch.linalg.svd(weight.to(torch.bfloat16).double(), full_matrices=False)
    wanted = (U[:, :6] * S[:6]) @ Vh[:6]
    torch.testing.assert_close(scaling * B.double() @ A.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_large_matrices_are_close_to_exact_the_same_every_time_and_draw_nothing(monkeypatch):
    matrix = torch.randn(120, 90, generator=generator(2)) + 20 * torch.randn(120, 1) @ torch.randn(1, 90)
    exact = torch.linalg.svdvals(matrix)
    monkeypatch.setattr(initial, "EXACT_SVD_UP_TO", 50)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    U, S, Vh = truncated_svd(matrix, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert all(torch.equal(*pair) for pair in zip((U, S, Vh), truncated_svd(matrix, 4), strict=True))
    torch.testing.assert_close(S, exact[:4], rtol=1e-2, atol=0)
    assert (matrix - (U * S) @ Vh).norm() <= exact[4:].norm() * 1.001


def test_a_rank_above_the_weights_is_refused():
    with pytest.raises(ValueError, match="rank: 7 should be from 1 to 6 for a weight of 9 × 6"):
        pissa(torch.zeros(9, 6), 7, 1.0)
    with pytest.raises(ValueError, match="scaling: 0.0 should be above 0"):
        pissa(torch.zeros(9, 6), 3, 0.0)
