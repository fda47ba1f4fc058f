"""The effective weight of an adapted layer, W + Σ deltas, and its low-rank kind of delta.

Training, merging and GGUF ask here what an adapter adds to a weight. A delta folds itself into a weight or some of its
rows, adds its output to the layer's, and gives its gradients. Terms with other structure are further classes with the
methods of :class:`LowRank`; a scale of the rows (DoRA's) multiplies the sum in :func:`fold`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """The term scaling · B A of a weight (LoRA, arXiv:2106.09685).

    Attributes:
        A: (rank, in).
        B: (out, rank), of the dtype of `A`.
        scaling: Factor on the product.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def T(self) -> "LowRank":  # noqa: N802
        """The same term of a weight that is stored (in, out)."""
        return LowRank(self.B.T, self.A.T, self.scaling)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The term with its factors in another dtype."""
        return LowRank(self.A.to(dtype), self.B.to(dtype), self.scaling)

    def rows(self, rows: slice) -> "LowRank":
        """The term of some rows of the weight."""
        return LowRank(self.A, self.B[rows], self.scaling)

    def fold(self, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return weight + scaling · B A, rounded once.

        Args:
            weight: (out, in), of the factors' dtype.
            out: Like `weight`, written in place if given; may be `weight` itself.
        """
        return torch.addmm(weight, self.B, self.A, alpha=self.scaling, out=out)

    def add_output_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add scaling · x Aᵀ Bᵀ to the output of the layer in place.

        Args:
            y: (tokens, out).
            x: (tokens, in).
        """
        y.addmm_(x @ self.A.T, self.B.T, alpha=self.scaling)

    def gradients(
        self,
        x: torch.Tensor,
        grad: torch.Tensor,
        needed: tuple[bool, bool] = (True, True),
        grad_x: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Compute the gradients of y = scaling · (x ∘ mask) Aᵀ Bᵀ, with u = scaling · g B.

        Args:
            x: (tokens, in).
            grad: g, the gradient of y, (tokens, out).
            needed: Whether the gradients of A and B are needed.
            grad_x: (tokens, in); the gradient of x, (u A) ∘ mask, is added to it in place if given.
            mask: Like `x`, of the dropout, if there is one.

        Returns:
            The gradients of A, uᵀ (x ∘ mask), and of B, scaling · gᵀ ((x ∘ mask) Aᵀ); None where not needed.
        """
        u = (grad @ self.B).mul_(self.scaling)
        if mask is None:
            masked = x
            if grad_x is not None:
                grad_x.addmm_(u, self.A)
        else:
            masked = x * mask
            if grad_x is not None:
                grad_x.addcmul_(u @ self.A, mask)
        grad_A = u.T @ masked if needed[0] else None
        grad_B = grad.T @ (masked @ self.A.T).mul_(self.scaling) if needed[1] else None
        return grad_A, grad_B


def fold(weight: torch.Tensor, deltas: Iterable[LowRank], out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the effective weight, W + Σ deltas, each term added in the dtype of the weight and rounded once.

    Args:
        weight: (out, in), or some rows of it; returned as it is if there are no deltas.
        deltas: Of the same rows, in the dtype of the weight.
        out: Like `weight`, written in place if given; may be `weight` itself.
    """
    for delta in deltas:
        weight = out = delta.fold(weight, out)
    return weight
