"""The effective weight of an adapted layer, c ∘ (W + Σ deltas): its deltas, and the scale c of its rows.

Training, merging and GGUF ask here what an adapter adds to a weight. A delta folds itself into a weight, adds its
output to the layer's, and gives its gradients. The scale of the rows is DoRA's; other adapters have none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

Gradients = tuple[torch.Tensor | None, ...]


class Delta(Protocol):
    """A term that an adapter adds to a weight of (out, in)."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that it is made of, which may get gradients."""

    @property
    def make(self) -> "Callable[..., Delta]":
        """Function that makes the same kind of term of other tensors, all of one dtype; it holds none of its own."""

    def fold(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum of a weight and the term, rounded once.

        Args:
            weight: (out, in), of the tensors' dtype.
            out: Like `weight`, written in place if given; may be `weight` itself.
        """

    def add_output_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product of x with the term to a layer's output in place.

        Args:
            y: (tokens, out).
            x: (tokens, in).
        """

    def gradients(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        needed: Sequence[bool],
        grad_x: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> Gradients:
        """Compute the gradients of what the term adds to an output, with the inputs x ∘ mask.

        Args:
            x: (tokens, in).
            grad: Gradient of the output, (tokens, out).
            needed: Whether the gradient of each of the tensors is needed.
            grad_x: (tokens, in); the gradient of x is added to it in place if given.
            mask: Like `x`, of the dropout, if there is one.

        Returns:
            The gradient of each of the tensors; None where not needed.
        """


@dataclass(frozen=True, slots=True)
class LowRank:
    """The term scaling · B A of a weight (LoRA, arXiv:2106.09685), or one for each expert of a layer.

    Attributes:
        A: (rank, in), or (experts, rank, in).
        B: (out, rank), or (experts, out, rank), of the dtype of `A`.
        scaling: Factor on the product.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def T(self) -> "LowRank":  # noqa: N802
        """The same term of a weight that is stored (in, out)."""
        return LowRank(self.B.mT, self.A.mT, self.scaling)

    def at(self, expert: int) -> "LowRank":
        """Return the term of one expert."""
        return LowRank(self.A[expert], self.B[expert], self.scaling)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return self.A, self.B

    @property
    def make(self) -> "Callable[..., LowRank]":
        """Function that makes a term of the same scaling of A and B."""
        return partial(LowRank, scaling=self.scaling)

    def to(self, place: torch.dtype | torch.device) -> "LowRank":
        """Return the term with its factors in another dtype, or on another device."""
        return LowRank(self.A.to(place), self.B.to(place), self.scaling)

    def rows(self, rows: slice) -> "LowRank":
        """Return the term of some rows of the weight."""
        return LowRank(self.A, self.B[rows], self.scaling)

    def joined(self, other: "LowRank | None") -> "LowRank":
        """Return the sum of two terms as one, whose scaling is this one's: the factors side by side.

        B of the other term is multiplied by the ratio of the scalings. The result keeps the factors' dtype where that
        is exact; otherwise it is in fp32.
        """
        if other is None:
            return self
        B = other.B.float() * (other.scaling / self.scaling)
        dtypes = {each.dtype for each in (*self.tensors, *other.tensors)}
        is_exact = len(dtypes) == 1 and torch.equal(B.to(self.B.dtype).float(), B)
        dtype = self.B.dtype if is_exact else torch.float32
        A = torch.cat([self.A.to(dtype), other.A.to(dtype)])
        return LowRank(A, torch.cat([self.B.to(dtype), B.to(dtype)], dim=1), self.scaling)

    def fold(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return weight + scaling · B A, rounded once; see :meth:`Delta.fold`."""
        return torch.addmm(weight, self.B, self.A, alpha=self.scaling, out=out)

    def add_output_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add scaling · x Aᵀ Bᵀ to y in place; see :meth:`Delta.add_output_`."""
        y.addmm_(x @ self.A.T, self.B.T, alpha=self.scaling)

    def gradients(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        needed: Sequence[bool] = (True, True),
        grad_x: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> Gradients:
        """Compute the gradients of y = scaling · (x ∘ mask) Aᵀ Bᵀ, with u = g B; see :meth:`Delta.gradients`.

        Returns:
            The gradients of A, scaling · uᵀ (x ∘ mask), and of B, scaling · gᵀ ((x ∘ mask) Aᵀ); None where not needed.
        """
        masked = x if mask is None else x * mask
        u = grad @ self.B if needed[0] or grad_x is not None else None
        if grad_x is not None:
            assert u is not None
            if mask is None:
                grad_x.addmm_(u, self.A, alpha=self.scaling)
            else:
                grad_x.addcmul_(u @ self.A, mask, value=self.scaling)
        grad_A = _scaled_product(u.T, masked, self.scaling) if u is not None and needed[0] else None
        grad_B = _scaled_product(grad.T, masked @ self.A.T, self.scaling) if needed[1] else None
        return grad_A, grad_B


def _scaled_product(one: torch.Tensor, other: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return scaling · one other, scaled before it is rounded; on a GPU that is one kernel."""
    return one.new_empty(one.shape[0], other.shape[1]).addmm_(one, other, beta=0, alpha=scaling)


@dataclass(frozen=True, slots=True)
class SparseRows:
    """A term that is zero except in some rows of the weight (S2FT, arXiv:2412.06289).

    Attributes:
        values: What is added to these rows, (rows, in).
        index: Their indices in the weight, (rows,), each once.
    """

    values: torch.Tensor
    index: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor]:
        """The values."""
        return (self.values,)

    @property
    def make(self) -> "Callable[..., SparseRows]":
        """Function that makes a term of the same rows of their values."""
        return partial(SparseRows, index=self.index)

    def as_low_rank(self, out_features: int) -> LowRank:
        """Return the same term as B A: A is the values, and B has a single one in each column, at the row's index."""
        B = torch.zeros(out_features, len(self.index), dtype=self.values.dtype, device=self.values.device)
        B[self.index, torch.arange(len(self.index), device=B.device)] = 1
        return LowRank(self.values, B, 1.0)

    def fold(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight with the values added to its rows; see :meth:`Delta.fold`."""
        if out is None:
            return weight.index_add(0, self.index, self.values)
        if out is not weight:
            out.copy_(weight)
        return out.index_add_(0, self.index, self.values)

    def add_output_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add x · valuesᵀ to these features of y in place; see :meth:`Delta.add_output_`."""
        y.index_add_(1, self.index, x @ self.values.T)

    def gradients(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        needed: Sequence[bool] = (True,),
        grad_x: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> Gradients:
        """Compute the gradient of the values, g[:, index]ᵀ (x ∘ mask); see :meth:`Delta.gradients`."""
        own = grad[:, self.index]
        if grad_x is not None:
            if mask is None:
                grad_x.addmm_(own, self.values)
            else:
                grad_x.addcmul_(own @ self.values, mask)
        return (own.T @ (x if mask is None else x * mask) if needed[0] else None,)


def fold(weight: torch.Tensor, deltas: Iterable[Delta], out: torch.Tensor | None = None) -> torch.Tensor:
    """Return W + Σ deltas, each term added in the dtype of the weight and rounded once.

    Args:
        weight: (out, in), or some rows of it; returned as it is if there are no deltas.
        deltas: Of the same rows, in the dtype of the weight.
        out: Like `weight`, written in place if given; may be `weight` itself.
    """
    for delta in deltas:
        weight = out = delta.fold(weight, out)
    return weight


def row_norms(weight: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Return the Euclidean norms of a weight's rows in fp32: (out,), the denominator of DoRA's scale.

    Args:
        weight: (out, in).
        dim: Dimension of the inputs; 0 for a weight that is stored (in, out).
    """
    return torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float32)


def row_scale(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return magnitude / norms in fp32, DoRA's scale c of the rows; 1 for rows of zeros, which have no direction.

    Args:
        magnitude: (out,), fp32.
        norms: (out,), fp32, see :func:`row_norms`.
    """
    return torch.where(norms > 0, magnitude / norms, 1.0)


def scale_rows(
    y: torch.Tensor, magnitude: torch.Tensor, norms: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Turn the output of a weight into that of the weight with rescaled rows (DoRA, arXiv:2402.09353, eq. 5).

    With c = magnitude / norms it is c ∘ (y − bias) + bias, computed as y + (c − 1) ∘ (y − bias): where c is 1, it is y
    bit for bit. The norms get no gradient, as in §4.3 of the paper.

    Args:
        y: (tokens, out).
        magnitude: (out,), fp32.
        norms: (out,), fp32, see :func:`row_norms`.
        bias: (out,) that y contains, in its dtype; None if there is none.
    """
    return _ScaleRows.apply(y, magnitude, norms, bias)


class _ScaleRows(torch.autograd.Function):
    """See :func:`scale_rows`; dL/dy = c ∘ g, and dL/dmagnitude = Σ over tokens of g ∘ (y − bias) / norms."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, magnitude: torch.Tensor, norms: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(y, magnitude, norms, bias)
        change = (row_scale(magnitude, norms) - 1).to(y.dtype)
        return torch.addcmul(y, y if bias is None else y - bias, change)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, magnitude, norms, bias = ctx.saved_tensors
        grad_magnitude = None
        if ctx.needs_input_grad[1]:
            # fp16 has too small a range for products of loss-scaled gradients.
            wide = grad.float() if grad.dtype == torch.float16 else grad
            products = wide * (y if bias is None else y - bias)
            grad_magnitude = torch.where(norms > 0, products.sum(0, dtype=torch.float32) / norms, 0.0)
        change = (row_scale(magnitude, norms) - 1).to(y.dtype)
        return torch.addcmul(grad, grad, change), grad_magnitude, None, None
