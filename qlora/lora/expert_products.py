"""The autograd function of a layer of experts: a group of experts after the other, and the exact backward.

It saves the layer's input as given, the scores of the chosen experts and the order of the tokens, and no weight. The
rows of the experts are gathered again in the backward, because the rows of all experts are `top_k` times the input.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels import (
    FEW_ROWS,
    ROWS_PER_TOKEN,
    ExpertGroup,
    LowRank,
    experts_at_once,
    group_experts,
    grouped_matmul,
    grouped_outer,
    save_first,
)

Gate = Callable[[torch.Tensor], torch.Tensor]


class ExpertWeights(Protocol):
    """The frozen weights of all experts of a layer for one of their two products, in whatever form.

    Attributes:
        shape: (experts, rows, columns) of the weights, in the orientation of the model.
        device: Device on which they are used.
    """

    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def weights_for_product(
        self, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None = None
    ) -> torch.Tensor:
        """Return the weights of a group of experts for a product that starts at once; the next call may overwrite them.

        Args:
            group: The experts: `group.experts` on the host, `group.index` on the device.
            dtype: Dtype of the result.
            update: Terms of all experts of the layer, of which each expert's is added to its weight: in any dtype and
                in the orientation of the weights.

        Returns:
            (experts of the group, rows, columns).
        """


@dataclass(frozen=True, slots=True)
class ExpertProjection:
    """One of the two products of each expert.

    Attributes:
        weights: The weights of all experts, such as :class:`qlora.nf4.NF4Experts`.
        bias: (experts, out), or None.
        is_transposed: Whether an expert's weight is (in, out) instead of (out, in).
        scaling: Factor on B A; None without factors.
    """

    weights: ExpertWeights
    bias: torch.Tensor | None
    is_transposed: bool
    scaling: float | None = None

    @property
    def num_factors(self) -> int:
        """Number of the projection's trained tensors: A, (experts, rank, in), and B, (experts, out, rank)."""
        return 0 if self.scaling is None else 2

    @property
    def num_weights(self) -> int:
        """Number of weights of an expert."""
        return self.weights.shape[1] * self.weights.shape[2]

    def effective(self, group: ExpertGroup, factors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the effective weights of a group, (experts of the group, out, in); the next call may overwrite them.

        Args:
            group: The experts.
            factors: The projection's trained tensors.
            dtype: Dtype of the result.
        """
        weights = self.weights.weights_for_product(group, dtype, self._update(factors))
        return weights.mT if self.is_transposed else weights

    def _update(self, factors: Sequence[torch.Tensor]) -> LowRank | None:
        if self.scaling is None:
            return None
        A, B = factors
        update = LowRank(A, B, self.scaling)
        return update.T if self.is_transposed else update

    def output(self, x: torch.Tensor, weights: torch.Tensor, group: ExpertGroup) -> torch.Tensor:
        """Return x Wᵀ + bias of the group's rows, (rows, out)."""
        return grouped_matmul(x, weights, group, bias=self.bias, of_group=True)

    def add_gradients(
        self,
        grads: Sequence[torch.Tensor | None],
        factors: Sequence[torch.Tensor],
        x: torch.Tensor,
        grad: torch.Tensor,
        group: ExpertGroup,
    ) -> None:
        """Write the gradients of the factors of a group's experts, s (g B)ᵀ x and s gᵀ (x Aᵀ).

        Args:
            grads: Like `factors`, in the dtype of `x`; None where none is needed.
            factors: The projection's trained tensors.
            x: Inputs of the projection, (rows, in).
            grad: Gradients of its outputs, (rows, out).
            group: The experts.
        """
        if self.scaling is None:
            return
        (A, B), (grad_A, grad_B) = factors, grads
        if grad_A is not None:
            grouped_outer(grouped_matmul(grad, B.mT, group), x, group, grad_A, self.scaling)
        if grad_B is not None:
            grouped_outer(grad, grouped_matmul(x, A, group), group, grad_B, self.scaling)


def expert_products(
    x: torch.Tensor,
    index: torch.Tensor,
    scores: torch.Tensor,
    up: ExpertProjection,
    down: ExpertProjection,
    gate: Gate,
    factors: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Compute the sum over a token's experts of score · down(gate(up(x))).

    The sums are over a token's experts in their given order, so they do not depend on how tokens are grouped.

    Args:
        x: (tokens, hidden).
        index: (tokens, top_k), the experts of each token. Those from the number of experts on add nothing.
        scores: (tokens, top_k), in any floating-point dtype.
        up: The first product, with the gate's where there is one.
        down: The second product.
        gate: What is between them: (rows, out of `up`) to (rows, in of `down`), without parameters.
        factors: The trained tensors of `up` and `down`.

    Returns:
        (tokens, hidden), in the dtype of `x`, in which all products are computed.
    """
    experts, order = index.reshape(-1).sort(stable=True)
    most_experts = experts_at_once(
        up.weights.device, x.dtype, max(up.num_weights, down.num_weights), try_kernels=not x.is_meta
    )
    num_experts, most_rows = up.weights.shape[0], max(ROWS_PER_TOKEN * len(x), FEW_ROWS)
    bounds = torch.searchsorted(experts, torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device))
    hit = (bounds.diff() == 0).sort(stable=True).indices
    # First, so that a recomputation ends here where these products are the last of its region.
    saved = save_first(*factors, x, scores, order, bounds, hit)
    if x.is_meta:  # which has no values: as if one group got the most rows that a group gets
        size = min(most_experts, index.shape[-1], ROWS_PER_TOKEN)
        offsets = [*range(0, size * len(x), len(x)), *[size * len(x)] * (num_experts + 1 - size)]
    else:
        offsets = bounds.tolist()  # the only wait of the host for the device
    call = _Call(up, down, gate, offsets, index.shape[-1], most_experts, most_rows)
    return _ExpertProducts.apply(x, scores, saved, call, order, bounds, hit, *factors)


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of the products besides their tensors.

    Attributes:
        up: The first product.
        down: The second product.
        gate: What is between them.
        offsets: Where the rows of each expert begin in the order, and the end.
        top_k: Number of experts of a token.
        most_experts: Number of experts of a group.
        most_rows: Number of rows of a group.
    """

    up: ExpertProjection
    down: ExpertProjection
    gate: Gate
    offsets: list[int]
    top_k: int
    most_experts: int
    most_rows: int

    def groups(
        self, order: torch.Tensor, bounds: torch.Tensor, hit: torch.Tensor
    ) -> Iterator[tuple[ExpertGroup, torch.Tensor, torch.Tensor]]:
        """Yield groups of all experts that have tokens, with the places of its rows among all, and their tokens."""
        for group in group_experts(self.offsets, hit, bounds, self.most_experts, self.most_rows):
            rows = order[group.rows]
            yield group, rows, rows // self.top_k

    def rows_like(self, x: torch.Tensor, features: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor with a row for each token and expert, in the dtype of `x` by default.

        It is empty if all rows will be written, else zeros.
        """
        shape = len(x) * self.top_k, features
        is_full = self.offsets[-1] == shape[0] and not self.offsets[0]
        return (x.new_empty if is_full else x.new_zeros)(shape, dtype=dtype or x.dtype)

    def split(self, factors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Return the trained tensors of the first product and of the second."""
        return factors[: self.up.num_factors], factors[self.up.num_factors :]


class _ExpertProducts(torch.autograd.Function):
    """See :func:`expert_products`.

    With g = dL/dy of a token and s the score of one of its experts, h = gate(p) and p = up(x): dL/ds = ⟨g W₂, h⟩ +
    ⟨g, b₂⟩, dL/dh = s g W₂ and dL/dx = dL/dp W₁. W₂ is used first and then W₁, so that each is dequantized once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scores: torch.Tensor,
        saved: torch.Tensor,
        call: _Call,
        order: torch.Tensor,
        bounds: torch.Tensor,
        hit: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.saved, ctx.call = saved.grad_fn, call
        up, down = call.split(factors)
        flat, outputs = scores.reshape(-1, 1), call.rows_like(x, x.shape[1])
        for group, rows, tokens in call.groups(order, bounds, hit):
            weights = call.up.effective(group, up, x.dtype)
            hidden = call.gate(call.up.output(x[tokens], weights, group))
            weights = call.down.effective(group, down, x.dtype)
            output = call.down.output(hidden, weights, group)
            outputs[rows] = (output * flat[rows]).to(x.dtype)
        return outputs.view(len(x), call.top_k, -1).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, tensors = ctx.call, ctx.saved.saved_tensors
        *factors, x, scores, order, bounds, hit = tensors
        needs_x, needs_scores, _, _, _, _, _, *needed = ctx.needs_input_grad
        up, down = call.split(factors)
        flat, dtype = scores.reshape(-1, 1), x.dtype
        grad_rows = call.rows_like(x, x.shape[1]) if needs_x else None
        grad_scores = call.rows_like(x, 1, flat.dtype) if needs_scores else None
        grads = [
            torch.zeros_like(each, dtype=dtype) if need else None for each, need in zip(factors, needed, strict=True)
        ]
        grads_up, grads_down = call.split(grads)
        for group, rows, tokens in call.groups(order, bounds, hit):
            inputs, own, score = x[tokens], grad[tokens], flat[rows]
            weights = call.down.effective(group, down, dtype)
            unscaled = grouped_matmul(own, weights.mT, group, of_group=True)
            weights = call.up.effective(group, up, dtype)
            with torch.enable_grad():
                first = call.up.output(inputs, weights, group).detach().requires_grad_()
                hidden = call.gate(first)
            if grad_scores is not None:
                products = (unscaled * hidden.detach()).sum(1, keepdim=True, dtype=torch.float32)
                if call.down.bias is not None:
                    products += grouped_matmul(own, call.down.bias.unsqueeze(1), group)
                grad_scores[rows] = products.to(flat.dtype)
            (grad_first,) = torch.autograd.grad(hidden, first, (unscaled * score).to(dtype))
            call.down.add_gradients(grads_down, down, hidden.detach(), (own * score).to(dtype), group)
            call.up.add_gradients(grads_up, up, inputs, grad_first, group)
            if grad_rows is not None:
                grad_rows[rows] = grouped_matmul(grad_first, weights.mT, group, of_group=True)
        grad_x = None if grad_rows is None else grad_rows.view(len(x), call.top_k, -1).sum(dim=1)
        grad_scores = None if grad_scores is None else grad_scores.view(scores.shape)
        return grad_x, grad_scores, None, None, None, None, None, *grads
