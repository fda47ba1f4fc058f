"""Initial values that make up for what quantization loses: adapter and quantized weight chosen together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qlora.lora.initial import Factors, check_rank, split, truncated_svd

STARTS = ("residual", "loftq")
FACTOR_DTYPES = (torch.bfloat16, torch.float32)
# Weight of the diagonal in a second moment: few tokens leave directions without any input, and what the adapter does
# there must stay bounded.
SHRINKAGE = 0.1


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """A quantized weight with the adapter that brings it closest to the original one.

    The layer's base is Q = NF4(W − scaling · subtracted.B subtracted.A), its effective weight before training
    Q + scaling · initial.B initial.A. All factors are in the dtype that they were asked for, so they are kept as they
    are, and :func:`subtract` with them gives the bits that were quantized.

    Attributes:
        initial: Initial values of the adapter.
        subtracted: Factors of the term that is subtracted from the weight before it is quantized; zeros for none.
        error: ‖(W − dq(Q) − scaling · B A) R‖ ÷ ‖(W − NF4(W)) R‖ in Frobenius norms, with R = 1 without a second
            moment: what is left of the error of plain quantization.
    """

    initial: Factors
    subtracted: Factors
    error: float


def reconstruct(
    weight: torch.Tensor,
    rank: int,
    scaling: float,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    *,
    iterations: int = 5,
    start: str = "residual",
    second_moment: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Reconstruction:
    """Choose what is subtracted from a weight before it is quantized, and the initial adapter, to lose the least.

    Alternates between Q = NF4(W − s · B A) and s · B A = the best approximation of W − dq(Q) by rank r (LoftQ,
    arXiv:2310.08659, algorithm 1), and keeps the best of all iterates. From the principal part of W (`residual`, as
    QPiSSA, arXiv:2404.02948, §3), blocks hold fewer outliers from the first quantization on; from zero, this is LoftQ.

    With a second moment, the error is that of the layer's output over its inputs: E‖(W − Ŵ) x‖² = ‖(W − Ŵ) R‖² for
    every R with R Rᵀ = E[xxᵀ], so the best approximation is svd_r((W − dq(Q)) R) R⁻¹ (QERA, arXiv:2410.06040,
    theorem 1, which takes the symmetric root; the Cholesky factor gives the same product).

    Args:
        weight: W, (out, in), any floating dtype.
        rank: Rank of both terms.
        scaling: s.
        quantize: Quantizes an fp32 matrix as the layer's weight will be and dequantizes it to fp32.
        iterations: Number of quantizations in the search.
        start: `residual` or `loftq`.
        second_moment: E[xxᵀ] of the layer's inputs, (in, in), or its diagonal, (in,), as
            :class:`qlora.lora.statistics.InputStatistics` gives them. Off the diagonal, it is multiplied by
            1 − `SHRINKAGE`.
        dtype: Dtype that the factors are stored in, bf16 or fp32.

    Raises:
        ValueError: An argument is out of range, unknown or of a wrong shape, or a moment is not finite.
    """
    check_rank(weight, rank)
    if start not in STARTS:
        raise ValueError(f"start: {start!r} should be one of {', '.join(STARTS)}.")
    if iterations < 1:
        raise ValueError(f"iterations: {iterations!r} should be a whole number from 1.")
    if dtype not in FACTOR_DTYPES:
        raise ValueError(f"dtype: {dtype} should be bfloat16 or float32.")
    weight = weight.detach().float()
    norm = _Norm(second_moment, weight)

    def approximate(matrix: torch.Tensor) -> Factors:
        U, S, Vh = truncated_svd(norm.weigh(matrix), rank)
        A, B = split(U, S, Vh, scaling)
        return Factors(norm.unweigh(A).to(dtype), B.to(dtype))

    (out, width), zeros = weight.shape, weight.new_zeros
    nothing = Factors(zeros(rank, width, dtype=dtype), zeros(out, rank, dtype=dtype))
    plain = norm(weight - quantize(weight))
    subtracted = approximate(weight) if start == "residual" else nothing
    best: Reconstruction | None = None
    for _ in range(iterations):
        lost = weight - quantize(subtract(weight, subtracted, scaling))
        initial = approximate(lost)
        error = norm(subtract(lost, initial, scaling)) / plain if plain else 0.0
        if best is None or error < best.error:
            best = Reconstruction(initial, subtracted, error)
        subtracted = initial
    assert best is not None
    return best


def subtract(weight: torch.Tensor, factors: Factors, scaling: float, block_rows: int = 1024) -> torch.Tensor:
    """Return weight − scaling · B A in fp32, with the same bits wherever it is computed.

    The product is taken in fp64, where products of bf16 numbers and their sums are exact unless they differ by many
    orders of magnitude. So the order of a sum, which differs between devices and between a weight and a block of its
    rows, has no effect, and training, a resumed run and a merge quantize the same numbers.

    Args:
        weight: (out, in), or some of its rows, any floating dtype.
        factors: A, and the same rows of B.
        scaling: Factor on the product.
        block_rows: Number of rows that are in fp64 at a time.
    """
    A, B = factors.A.double(), factors.B.double()
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), block_rows):
        rows = slice(first, first + block_rows)
        result[rows] = weight[rows].double().sub_((B[rows] @ A).mul_(scaling))
    return result


class _Norm:
    """The norm ‖E R‖ of an error E, with R Rᵀ the second moment, positive definite by shrinkage, or R = 1."""

    def __init__(self, second_moment: torch.Tensor | None, weight: torch.Tensor) -> None:
        self._root: torch.Tensor | None = None
        if second_moment is None:
            return
        width = weight.shape[1]
        shape = tuple(second_moment.shape)
        if shape not in ((width,), (width, width)):
            raise ValueError(f"second_moment: its shape {shape} should be ({width},) or ({width}, {width}).")
        moment = second_moment.to(weight.device, torch.float64, copy=True)
        diagonal = (moment if moment.dim() == 1 else moment.diagonal()).clone()
        if not moment.isfinite().all() or (diagonal < 0).any() or not diagonal.sum() > 0:
            raise ValueError("second_moment: it should be finite, with a diagonal from 0, not all zeros.")
        least = 1e-6 * diagonal.mean()  # a feature that is always 0 must not be divided by 0
        if moment.dim() == 1:
            self._root = (diagonal + least).sqrt().float()
            return
        moment.mul_(1 - SHRINKAGE).diagonal().copy_(diagonal + least)
        root, info = torch.linalg.cholesky_ex(moment)
        if info:
            raise ValueError("second_moment: a matrix should be symmetric and positive semidefinite.")
        self._root = root.float()

    def __call__(self, error: torch.Tensor) -> float:
        # Summed in fp64: a sum of millions of squares in fp32 is off by as much as iterates differ.
        return torch.linalg.vector_norm(self.weigh(error), dtype=torch.float64).item()

    def weigh(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return matrix · R."""
        if self._root is None:
            return matrix
        return matrix * self._root if self._root.dim() == 1 else matrix @ self._root

    def unweigh(self, A: torch.Tensor) -> torch.Tensor:
        """Return A · R⁻¹."""
        if self._root is None:
            return A
        if self._root.dim() == 1:
            return A / self._root
        return torch.linalg.solve_triangular(self._root, A, upper=False, left=False)
