"""The autograd function of a layer of experts: a loop over the experts that have tokens, and the exact backward.

It saves the layer's input as given, the scores of the chosen experts and the order of the tokens, and no weight. The
rows of an expert are gathered again in the backward, because the rows of all experts are `top_k` times the input.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels import LowRank, save_first

Gate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExpertProjection:
    """One of the two products of each expert.

    Attributes:
        weights: The weights of all experts: anything with `weight_for_product(expert, dtype, deltas)`, such as
            :class:`qlora.nf4.NF4Experts`.
        bias: (experts, out), or None.
        is_transposed: Whether an expert's weight is (in, out) instead of (out, in).
        scaling: Factor on B A; None without factors.
    """

    weights: Any
    bias: torch.Tensor | None
    is_transposed: bool
    scaling: float | None = None

    @property
    def num_factors(self) -> int:
        """Number of the projection's trained tensors: A, (experts, rank, in), and B, (experts, out, rank)."""
        return 0 if self.scaling is None else 2

    def delta(self, expert: int, factors: Sequence[torch.Tensor], dtype: torch.dtype) -> LowRank | None:
        """Return what is added to an expert's weight, (out, in), in `dtype`; None without factors."""
        if self.scaling is None:
            return None
        A, B = (factor[expert].to(dtype) for factor in factors)
        return LowRank(A, B, self.scaling)

    def weight(self, expert: int, delta: LowRank | None, dtype: torch.dtype) -> torch.Tensor:
        """Return an expert's effective weight, (out, in); the next call may overwrite it."""
        deltas = () if delta is None else (delta.T if self.is_transposed else delta,)
        weight: torch.Tensor = self.weights.weight_for_product(expert, dtype, deltas)
        return weight.T if self.is_transposed else weight

    def output(self, x: torch.Tensor, expert: int, weight: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + bias, (rows, out)."""
        y = x @ weight.T
        return y if self.bias is None else y.add_(self.bias[expert].to(y.dtype))


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
    num_experts = up.weights.shape[0]
    if x.is_meta:  # which has no values: as if all tokens went to one expert, the most that an expert gets
        offsets = [0, *[len(x)] * num_experts]
    else:
        bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
        offsets = torch.searchsorted(experts, bounds).tolist()  # the only wait of the host for the device
    # First, so that a recomputation ends here where these products are the last of its region.
    saved = save_first(*factors, x, scores, order)
    call = _Call(up, down, gate, offsets, index.shape[-1])
    return _ExpertProducts.apply(x, scores, saved, call, order, *factors)


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of the products besides their tensors.

    Attributes:
        up: The first product.
        down: The second product.
        gate: What is between them.
        offsets: Where the rows of each expert begin in the order, and the end.
        top_k: Number of experts of a token.
    """

    up: ExpertProjection
    down: ExpertProjection
    gate: Gate
    offsets: list[int]
    top_k: int

    def hit(self, order: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield each expert that has tokens, with the places of its rows among all, and their tokens."""
        for expert, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if start < stop:
                rows = order[start:stop]
                yield expert, rows, rows // self.top_k

    def rows_like(self, x: torch.Tensor, features: int) -> torch.Tensor:
        """Return a tensor for a row of each token and expert; zeros if some have none."""
        shape = len(x) * self.top_k, features
        return x.new_empty(shape) if self.offsets[-1] == shape[0] and not self.offsets[0] else x.new_zeros(shape)

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
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.saved, ctx.call = saved.grad_fn, call
        up, down = call.split(factors)
        flat, outputs = scores.reshape(-1, 1), call.rows_like(x, x.shape[1])
        for expert, rows, tokens in call.hit(order):
            weight = call.up.weight(expert, call.up.delta(expert, up, x.dtype), x.dtype)
            hidden = call.gate(call.up.output(x[tokens], expert, weight))
            weight = call.down.weight(expert, call.down.delta(expert, down, x.dtype), x.dtype)
            output = call.down.output(hidden, expert, weight)
            outputs[rows] = (output * flat[rows]).to(x.dtype)
        return outputs.view(len(x), call.top_k, -1).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, tensors = ctx.call, ctx.saved.saved_tensors
        *factors, x, scores, order = tensors
        needs_x, needs_scores, _, _, _, *needed = ctx.needs_input_grad
        up, down = call.split(factors)
        flat, dtype = scores.reshape(-1, 1), x.dtype
        grad_rows = call.rows_like(x, x.shape[1]) if needs_x else None
        grad_scores = torch.zeros_like(flat) if needs_scores else None
        grads = [
            torch.zeros_like(each, dtype=dtype) if need else None for each, need in zip(factors, needed, strict=True)
        ]
        grads_up, grads_down = call.split(grads)
        for expert, rows, tokens in call.hit(order):
            inputs, own, score = x[tokens], grad[tokens], flat[rows]
            delta_up, delta_down = call.up.delta(expert, up, dtype), call.down.delta(expert, down, dtype)
            unscaled = own @ call.down.weight(expert, delta_down, dtype)
            weight = call.up.weight(expert, delta_up, dtype)
            with torch.enable_grad():
                first = call.up.output(inputs, expert, weight).detach().requires_grad_()
                hidden = call.gate(first)
            if grad_scores is not None:
                products = (unscaled * hidden.detach()).sum(1, keepdim=True, dtype=torch.float32)
                if call.down.bias is not None:
                    products += (own * call.down.bias[expert].to(dtype)).sum(1, keepdim=True, dtype=torch.float32)
                grad_scores[rows] = products.to(flat.dtype)
            (grad_first,) = torch.autograd.grad(hidden, first, (unscaled * score).to(dtype))
            _add(grads_down, delta_down, expert, hidden.detach(), (own * score).to(dtype))
            _add(grads_up, delta_up, expert, inputs, grad_first)
            if grad_rows is not None:
                grad_rows[rows] = grad_first @ weight
        grad_x = None if grad_rows is None else grad_rows.view(len(x), call.top_k, -1).sum(dim=1)
        return grad_x, None if grad_scores is None else grad_scores.view(scores.shape), None, None, None, *grads


def _add(
    grads: Sequence[torch.Tensor | None], delta: LowRank | None, expert: int, x: torch.Tensor, grad: torch.Tensor
) -> None:
    """Set the gradients of an expert's factors."""
    if delta is None or all(each is None for each in grads):
        return
    found = delta.gradients(x, grad, [each is not None for each in grads])
    for all_experts, own in zip(grads, found, strict=True):
        if all_experts is not None and own is not None:
            all_experts[expert] = own
