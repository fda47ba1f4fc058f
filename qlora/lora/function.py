"""The autograd function of a LoRA linear, in two forms: it saves x, or what x is built from, and no weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import Recipe, scratch

FORMS = ("separate", "folded")
# Tokens from which folding is the faster form, by type of device. Measured on two CPU cores at rank 16
# (docs/benchmarks/forms.md). For CUDA derived, not measured: folding costs as much as `rank` tokens more and no pass
# over activations, so that little but the launches of small batches speaks against it.
FOLD_FROM_TOKENS = {"cpu": 2048, "cuda": 512}


def choose_form(form: str, num_tokens: int, device: torch.device, dropout: float) -> str:
    """The form that a product is computed in.

    Args:
        form: `separate`, `folded`, or `auto` for the faster one.
        num_tokens: Rows of the input.
        device: That it is on.
        dropout: On the input of the low-rank branch, which only the separate form has.
    """
    if dropout:
        return "separate"
    if form != "auto":
        return form
    from_tokens = FOLD_FROM_TOKENS.get(device.type)
    return "separate" if from_tokens is None or num_tokens < from_tokens else "folded"


@contextmanager
def weights_kept() -> Iterator[None]:
    """While a layer is recomputed: the weights that its linears dequantize are kept until their backward asks."""
    _kept.clear()  # of a layer whose backward did not need them all
    _kept.is_on = True
    try:
        yield
    finally:
        _kept.is_on = False


def dropout_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """The scaled mask of inverted dropout, like `x`; the same for the same seed, so it need not be saved."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def lora_linear(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    base: Any,
    scaling: float,
    form: str = "auto",
    dropout: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ (LoRA, arXiv:2106.09685, eq. 3).

    `separate` computes the two products one after the other; `folded` rounds W + scaling · B A once and computes one.

    Args:
        x: (..., in). With the attribute `recipe`, what it is built from is saved in its place.
        lora_A: (rank, in).
        lora_B: (out, rank).
        base: The frozen layer: `nn.Linear`, or one with `bias` and `weight_for_product`.
        scaling: Of the update.
        form: `auto`, `separate` or `folded`.
        dropout: On the input of the low-rank branch.
        seed: Of the dropout.

    Returns:
        (..., out), in the dtype of `x`, in which all products are computed.
    """
    form = choose_form(form, x.numel() // x.shape[-1], x.device, dropout)
    recipe: Recipe | None = getattr(x, "recipe", None)
    saved = _Saved.apply(lora_A, lora_B, *((x,) if recipe is None else recipe.inputs))
    return _LoraLinear.apply(x, lora_A, lora_B, saved, base, scaling, form, dropout, seed, recipe)


class _Kept:
    """Weights between a layer's recomputation and its backward, by the id of their base layer."""

    def __init__(self) -> None:
        self.is_on = False
        self._weights: dict[int, torch.Tensor] = {}

    def put(self, base: Any, weight: torch.Tensor) -> None:
        self._weights[id(base)] = weight

    def take(self, base: Any) -> torch.Tensor | None:
        return self._weights.pop(id(base), None)

    def clear(self) -> None:
        self._weights.clear()


_kept = _Kept()


class _Saved(torch.autograd.Function):
    """Saves what :class:`_LoraLinear` needs in its backward, before that one's product is computed.

    Recomputation stops with the last tensor that is saved, and so without the last product of its region.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _LoraLinear(torch.autograd.Function):
    """See :func:`lora_linear`.

    With g = dL/dy, u = scaling · g B and W_eff the weight that x was multiplied by: dL/dx = g W_eff when folded, else
    g W + u A; dL/dA = uᵀ x, dL/dB = scaling · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        saved: torch.Tensor,
        base: Any,
        scaling: float,
        form: str,
        dropout: float,
        seed: int,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        ctx.saved, ctx.source = saved.grad_fn, None if recipe is None else recipe.source.add_user()
        ctx.base, ctx.scaling, ctx.form, ctx.dropout, ctx.seed = base, scaling, form, dropout, seed
        rows = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        keeps = _kept.is_on and ctx.needs_input_grad[0]
        weight = _weight(base, x.dtype, (A, B, scaling) if form == "folded" else None, lasting=keeps)
        if keeps:
            _kept.put(base, weight)
        y = F.linear(rows, weight, bias)
        if form == "separate":
            dropped = rows * dropout_mask(rows, dropout, seed) if dropout else rows
            y.addmm_(dropped @ A.T, B.T, alpha=scaling)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        lora_A, lora_B, *inputs = ctx.saved.saved_tensors
        x = inputs[0] if ctx.source is None else ctx.source.build(*inputs)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask = dropout_mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
        dropped = rows if mask is None else rows * mask

        u = (grad @ B).mul_(ctx.scaling)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            weight = _kept.take(ctx.base)
            if weight is None:
                weight = _weight(ctx.base, x.dtype, (A, B, ctx.scaling) if ctx.form == "folded" else None)
            grad_x = grad @ weight
            if mask is not None:
                grad_x.addcmul_(u @ A, mask)
            elif ctx.form == "separate":
                grad_x.addmm_(u, A)
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            grad_A = u.T @ dropped
        if ctx.needs_input_grad[2]:
            grad_B = grad.T @ (dropped @ A.T).mul_(ctx.scaling)
        return grad_x, grad_A, grad_B, *(None,) * 7


def _weight(
    base: Any, dtype: torch.dtype, update: tuple[torch.Tensor, torch.Tensor, float] | None, lasting: bool = False
) -> torch.Tensor:
    """The frozen weight, (out, in), in `dtype`, as `NF4Linear.weight_for_product` gives it, of any base."""
    if not isinstance(base, nn.Linear):
        return base.weight_for_product(dtype, update, lasting)
    weight = base.weight.to(dtype)
    if update is None:
        return weight
    A, B, scaling = update
    out = None if lasting else scratch(weight.shape, dtype, weight.device)
    return torch.addmm(weight, B, A, alpha=scaling, out=out)
