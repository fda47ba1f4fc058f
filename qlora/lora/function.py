"""The autograd function of a LoRA linear, in two forms: it saves x, or what x is built from, and no weight."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import Recipe, recipe_of, save_first, scratch

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


def dropout_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """The scaled mask of inverted dropout, like `x`; the same for the same seed, so it need not be saved."""
    device = "cpu" if x.is_meta else x.device  # no numbers are drawn where there are none
    generator = torch.Generator(device=device).manual_seed(seed)
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
    rows = x.reshape(-1, x.shape[-1])
    form = choose_form(form, len(rows), x.device, dropout)
    recipe = recipe_of(x)
    # First, so that a recomputation ends here where this product is the last of its region.
    saved = save_first(lora_A, lora_B, *((x,) if recipe is None else recipe.inputs))
    y = _LoraLinear.apply(rows, lora_A, lora_B, saved, base, scaling, form, dropout, seed, recipe)
    # Outside of the function, as models that add to an output in place may not do so to a view made inside of one.
    return y.view(*x.shape[:-1], y.shape[-1])


class WeightsKept:
    """Entered while a layer is recomputed: the weights that its linears use are kept until their backward asks."""

    _depth = 0
    _weights: ClassVar[dict[int, torch.Tensor]] = {}  # by the id of the base layer

    def __enter__(self) -> None:
        WeightsKept._depth += 1

    def __exit__(self, *error: object) -> None:
        WeightsKept._depth -= 1

    @classmethod
    def is_on(cls) -> bool:
        """Whether a recomputation is under way."""
        return cls._depth > 0

    @classmethod
    def put(cls, base: Any, weight: torch.Tensor) -> None:
        """Keeps a base layer's weight."""
        cls._weights[id(base)] = weight

    @classmethod
    def clear(cls) -> None:
        """Keeps nothing any longer, after a backward that was given up."""
        cls._weights.clear()

    @classmethod
    def take(cls, base: Any) -> torch.Tensor | None:
        """A base layer's weight, kept no longer."""
        return cls._weights.pop(id(base), None)


class _LoraLinear(torch.autograd.Function):
    """See :func:`lora_linear`.

    With g = dL/dy, u = scaling · g B and W_eff the weight that x was multiplied by: dL/dx = g W_eff when folded, else
    g W + u A; dL/dA = uᵀ x, dL/dB = scaling · gᵀ (x Aᵀ).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
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
        dtype = rows.dtype
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        keeps = WeightsKept.is_on() and ctx.needs_input_grad[0]
        WeightsKept.take(base)  # of a backward that was given up
        weight = _weight(base, dtype, (A, B, scaling) if form == "folded" else None, lasting=keeps)
        if keeps:
            WeightsKept.put(base, weight)
        y = F.linear(rows, weight, bias)
        if form == "separate":
            dropped = rows * dropout_mask(rows, dropout, seed) if dropout else rows
            y.addmm_(dropped @ A.T, B.T, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        lora_A, lora_B, *inputs = ctx.saved.saved_tensors
        x = inputs[0] if ctx.source is None else ctx.source.build(*inputs)
        rows = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        mask = dropout_mask(rows, ctx.dropout, ctx.seed) if ctx.dropout else None
        dropped = rows if mask is None else rows * mask

        u = (grad @ B).mul_(ctx.scaling)
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            weight = WeightsKept.take(ctx.base)
            if weight is None:
                weight = _weight(ctx.base, x.dtype, (A, B, ctx.scaling) if ctx.form == "folded" else None)
            grad_x = grad @ weight
            if mask is not None:
                grad_x.addcmul_(u @ A, mask)
            elif ctx.form == "separate":
                grad_x.addmm_(u, A)
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
