"""Initial values of the factors that follow from a weight or its shape: orthonormal rows and principal components."""

from typing import NamedTuple

import torch

# Up to this size of the smaller side, singular vectors are computed exactly; above, by subspace iterations.
EXACT_SVD_UP_TO = 512
_OVERSAMPLING, _ITERATIONS = 16, 8


class Factors(NamedTuple):
    """Factors of a low-rank term.

    Attributes:
        A: (rank, in).
        B: (out, rank).
    """

    A: torch.Tensor
    B: torch.Tensor


def orthogonal(rank: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """Draw A with orthonormal rows, A Aᵀ = I, uniformly among all such matrices.

    Training B alone relies on them: x Aᵀ is then the projection of x onto the rows.

    Args:
        rank: Number of rows, at most `in_features`.
        in_features: Number of columns.
        generator: A CPU generator, so that a seed gives the same values on every device.

    Returns:
        A, (rank, in_features), fp32 on the CPU.

    Raises:
        ValueError: There are more rows than columns.
    """
    if not 1 <= rank <= in_features:
        raise ValueError(f"rank: {rank} rows of {in_features} numbers can't be orthogonal; use 1 to {in_features}.")
    normal = torch.randn(in_features, rank, generator=generator, dtype=torch.float64)
    columns, triangle = torch.linalg.qr(normal)
    # QR's signs depend on its algorithm; with a positive diagonal, the result is uniform and the same everywhere.
    return (columns * triangle.diagonal().sign()).T.contiguous().float()


def pissa(weight: torch.Tensor, rank: int, scaling: float) -> Factors:
    """Compute factors whose term is the principal part of a weight (PiSSA, arXiv:2404.02948, §3).

    Args:
        weight: (out, in), any floating dtype.
        rank: Number of singular values.
        scaling: Factor on the product.

    Returns:
        A and B in fp32 with scaling · B A = svd_r(weight); see :func:`truncated_svd` for its accuracy.

    Raises:
        ValueError: The rank exceeds the weight's, or the scaling is not above 0.
    """
    check_rank(weight, rank)
    return split(*truncated_svd(weight.float(), rank), scaling)


def split(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, scaling: float) -> Factors:
    """Return factors with scaling · B A = U diag(S) Vh, and the root of each singular value on both sides."""
    if not scaling > 0:
        raise ValueError(f"scaling: {scaling!r} should be above 0.")
    root = (S / scaling).sqrt()
    return Factors(root[:, None] * Vh, U * root)


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the largest singular values and their vectors.

    Exact for matrices whose smaller side is at most `EXACT_SVD_UP_TO`. Above, by randomized subspace iterations from a
    fixed seed (arXiv:0909.4061), which left a remainder 0.04% larger at most than the smallest possible for a
    4096 × 4096 matrix and rank 16, see docs/benchmarks/methods.md. The random state of the caller is not changed.

    Args:
        matrix: (out, in), fp32.
        rank: Number of singular values, at most the smaller side.

    Returns:
        U, (out, rank); S, (rank,), from the largest on; Vh, (rank, in).
    """
    if min(matrix.shape) <= EXACT_SVD_UP_TO:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        width = min(rank + _OVERSAMPLING, *matrix.shape)
        U, S, V = torch.svd_lowrank(matrix, q=width, niter=_ITERATIONS)
    return U[:, :rank], S[:rank], V[:, :rank].T


def check_rank(weight: torch.Tensor, rank: int) -> None:
    """Raise `ValueError` if a weight has no `rank` singular values."""
    if weight.dim() != 2:
        raise ValueError(f"weight: its shape {tuple(weight.shape)} should be (out, in).")
    if not 1 <= rank <= min(weight.shape):
        out, width = weight.shape
        raise ValueError(f"rank: {rank} should be from 1 to {min(weight.shape)} for a weight of {out} × {width}.")
