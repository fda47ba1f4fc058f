"""RMSNorm with a frozen weight, and its gradient, in few passes with few temporary tensors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x / rms(x) · (offset + weight) (RMSNorm, arXiv:1910.07467).

    The sum of squares is computed in fp32 in a different order than models do, so a few results in a hundred thousand
    differ in the last bit of a 16-bit dtype. It works in place, which autograd can't follow: call it through `rebuilt`.

    Attributes:
        weight: (features,); gets no gradient.
        eps: Added to the mean of the squares.
        offset: Added to the weight: 1 in Gemma.
        rounds_first: Whether x / rms(x) is rounded to the dtype of x before it is multiplied by the weight, as in
            Llama, or afterwards.
        fused: Whether kernels compute it, see :mod:`qlora.kernels.norm_triton`.
    """

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    rounds_first: bool = False
    fused: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(…, features) -> (…, features)."""
        if self.fused:
            from qlora.kernels.norm_triton import rms_norm_triton

            return rms_norm_triton(x, self.weight, self.eps, self.offset, self.rounds_first)
        normed = x.to(torch.float32, copy=True)
        normed.mul_(self._inverse_rms(normed))
        if self.rounds_first:
            return normed.to(x.dtype) * self._scale(self.weight.dtype)
        return normed.mul_(self._scale(torch.float32)).to(x.dtype)

    def gradients(self, grad_output: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        """Compute the gradient of x, rounded once.

        It is s (h − s² x (x·h) / features) with s = 1 / rms(x) and h = grad_output · (offset + weight).

        Args:
            grad_output: (…, features).
            x: (…, features).
        """
        if self.fused:
            from qlora.kernels.norm_triton import rms_norm_gradient_triton

            return (rms_norm_gradient_triton(grad_output, x, self.weight, self.eps, self.offset),)
        rows = x.float()
        inverse_rms = self._inverse_rms(rows)
        grad = grad_output.to(torch.float32, copy=True).mul_(self._scale(torch.float32))
        along = torch.linalg.vecdot(rows, grad).unsqueeze(-1).mul_(inverse_rms.square()).div_(x.shape[-1])
        return (grad.addcmul_(rows, along, value=-1).mul_(inverse_rms).to(x.dtype),)

    def _inverse_rms(self, rows: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return norm.square_().div_(rows.shape[-1]).add_(self.eps).rsqrt_()

    def _scale(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.weight.detach().to(dtype)
        return weight + self.offset if self.offset else weight
