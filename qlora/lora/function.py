"""The autograd function of an adapted linear layer, in two forms; saves x, or its recipe's inputs, and no weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import Delta, filled_up, fold, recipe_of, row_norms, save_first, scale_rows, scratch
from qlora.kernels.rebuild import Source
from qlora.lora.spec import FORMS

# Tokens from which folding is the faster form, by type of device. Measured on two CPU cores at rank 16
# (docs/benchmarks/forms.md). Derived for CUDA, not measured: folding costs as much as `rank` more tokens and needs
# no pass over activations, so only the kernel launches of small batches make it slower.
FOLD_FROM_TOKENS = {"cpu": 2048, "cuda": 512}


def choose_form(form: str, num_tokens: int, device: torch.device, dropout: float, needs_norms: bool = False) -> str:
    """Return the form that a product is computed in.

    Args:
        form: `separate`, `folded`, or `auto` for the faster one.
        num_tokens: Number of rows of the input.
        device: Device of the input.
        dropout: Probability of dropping an input of the deltas, which only the separate form supports.
        needs_norms: Whether the norms of the effective weight are needed: then it is folded anyway.

    Raises:
        ValueError: There is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} should be one of {', '.join(FORMS)}")
    if dropout:
        return "separate"
    if form != "auto":
        return form
    if needs_norms:
        return "folded"
    from_tokens = FOLD_FROM_TOKENS.get(device.type)
    return "separate" if from_tokens is None or num_tokens < from_tokens else "folded"


def dropout_mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Return the scaled mask of inverted dropout, like `x`; the same for the same seed, so it need not be saved."""
    device = "cpu" if x.is_meta else x.device  # the meta device has no numbers to draw
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def lora_linear(
    x: torch.Tensor, base: Any, deltas: Sequence[Delta], *, form: str = "auto", dropout: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Compute y = x (W + Σ deltas)ᵀ + bias, with dropout on the x of the deltas (LoRA, arXiv:2106.09685, eq. 3).

    `separate` computes the products with W and with the deltas one after the other; `folded` rounds the effective
    weight once and computes one product.

    Args:
        x: (..., in). If it has the attribute `recipe`, the recipe's inputs are saved instead of it.
        base: The frozen layer: `nn.Linear`, or one with `bias` and `weight_for_product`.
        deltas: Terms added to its weight; tensors that do not require a gradient get none.
        form: `auto`, `separate` or `folded`.
        dropout: Probability of dropping an input of the deltas.
        seed: Seed of the dropout.

    Returns:
        (..., out), in the dtype of `x`, in which all products are computed.
    """
    return _product(x, base, deltas, False, form, dropout, seed)[0]


def dora_linear(
    x: torch.Tensor,
    base: Any,
    deltas: Sequence[Delta],
    magnitude: torch.Tensor,
    *,
    form: str = "auto",
    dropout: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Compute y = x (c ∘ (W + Σ deltas))ᵀ + bias, with c = magnitude / ‖W + Σ deltas‖ (DoRA, arXiv:2402.09353, eq. 5).

    It saves the product before the scale in addition to x: without it, the gradient of the magnitude would take
    another product with the whole weight.

    Args:
        x: See :func:`lora_linear`, as the arguments that are not listed here.
        base: The frozen layer.
        deltas: Terms added to its weight.
        magnitude: (out,), fp32: norms of the rows of the effective weight.
    """
    y, norms = _product(x, base, deltas, True, form, dropout, seed)
    bias = None if base.bias is None else base.bias.to(y.dtype)
    return scale_rows(y.flatten(0, -2), magnitude, norms, bias).view(y.shape)


def _product(
    x: torch.Tensor, base: Any, deltas: Sequence[Delta], needs_norms: bool, form: str, dropout: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (W + Σ deltas)ᵀ + bias, and the norms of the weight's rows if they are needed, else an empty tensor."""
    rows = x.reshape(-1, x.shape[-1])
    recipe = recipe_of(x)
    factors = [factor for delta in deltas for factor in delta.tensors]
    call = _Call(
        base=base,
        makers=tuple((delta.make, len(delta.tensors)) for delta in deltas),
        needs_norms=needs_norms,
        form=choose_form(form, len(rows), x.device, dropout, needs_norms),
        dropout=dropout,
        seed=seed,
        source=None if recipe is None else recipe.source,
    )
    if torch.is_grad_enabled():
        # First, so that a recomputation ends here where this product is the last of its region.
        saved = save_first(*factors, *((x,) if recipe is None else recipe.inputs))
        filled = filled_up(rows)
        y, norms = _LoraLinear.apply(filled, saved, call, *factors)
        if filled is not rows:
            y = y[: len(rows)]
    else:  # for a single token, the bookkeeping of a backward takes as long as the product
        y, norms = call.product(rows, factors)
    # Outside the function: a view made inside one must not be modified in place, which some models do to an output.
    return y.view(*x.shape[:-1], y.shape[-1]), norms


class RecomputedWeights:
    """Entered while a layer is recomputed; keeps the weights that its linear layers use for their backward."""

    _depth = 0
    _weights: ClassVar[dict[int, torch.Tensor]] = {}  # by the id of the base layer

    def __enter__(self) -> None:
        RecomputedWeights._depth += 1

    def __exit__(self, *error: object) -> None:
        RecomputedWeights._depth -= 1

    @classmethod
    def is_on(cls) -> bool:
        """Whether a layer is being recomputed."""
        return cls._depth > 0

    @classmethod
    def put(cls, base: Any, weight: torch.Tensor) -> None:
        """Keep a base layer's weight."""
        cls._weights[id(base)] = weight

    @classmethod
    def clear(cls) -> None:
        """Drop all weights, after a backward that was aborted."""
        cls._weights.clear()

    @classmethod
    def take(cls, base: Any) -> torch.Tensor | None:
        """Return a base layer's weight and drop it; None if there is none."""
        return cls._weights.pop(id(base), None)


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments of a product besides its tensors.

    Attributes:
        base: The frozen layer.
        makers: For each delta, the function that makes it of its tensors, and their number.
        needs_norms: Whether the norms of the effective weight's rows are needed.
        form: `separate` or `folded`.
        dropout: Probability of dropping an input of the deltas.
        seed: Seed of the dropout.
        source: Builds x again from the saved tensors; None if x itself is saved.
    """

    base: Any
    makers: tuple[tuple[Callable[..., Delta], int], ...]
    needs_norms: bool
    form: str
    dropout: float
    seed: int
    source: Source | None

    @property
    def num_factors(self) -> int:
        """Number of the deltas' tensors."""
        return sum(number for _, number in self.makers)

    def deltas(self, factors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[Delta]:
        """Return the deltas in the dtype of the product, made of their tensors."""
        cast = (factor.to(dtype) for factor in factors)
        return [make(*islice(cast, number)) for make, number in self.makers]

    def mask(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return the dropout mask for x; None without dropout."""
        return dropout_mask(rows, self.dropout, self.seed) if self.dropout else None

    def weight(self, deltas: Sequence[Delta], dtype: torch.dtype, lasting: bool = False) -> torch.Tensor:
        """Return the weight that x is multiplied by: the effective one if the form is `folded`, else the base's."""
        folded = deltas if self.form == "folded" else ()
        if not isinstance(self.base, nn.Linear):
            return self.base.weight_for_product(dtype, folded, lasting)
        weight = self.base.weight.to(dtype)
        out = None if lasting or not folded else scratch(weight.shape, dtype, weight.device)
        return fold(weight, folded, out)

    def product(
        self, rows: torch.Tensor, factors: Sequence[torch.Tensor], lasting: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x (W + Σ deltas)ᵀ + bias, and the norms of the weight's rows, see :meth:`norms`.

        Args:
            rows: x, (rows, in).
            factors: The deltas' tensors.
            lasting: Whether the weight is kept for the backward of a layer that is recomputed.
        """
        dtype = rows.dtype
        deltas = self.deltas(factors, dtype)
        bias = None if self.base.bias is None else self.base.bias.to(dtype)
        weight = self.weight(deltas, dtype, lasting)
        if lasting:
            RecomputedWeights.put(self.base, weight)
        y = F.linear(rows, weight, bias)
        if self.form == "separate":
            mask = self.mask(rows)
            x = rows if mask is None else rows * mask
            for delta in deltas:
                delta.add_output_(y, x)
        return y, self.norms(weight, deltas)

    def norms(self, weight: torch.Tensor, deltas: Sequence[Delta]) -> torch.Tensor:
        """Return the norms of the effective weight's rows, or an empty tensor if they are not needed.

        Args:
            weight: Weight that x was multiplied by.
            deltas: All deltas.
        """
        if not self.needs_norms:
            return weight.new_empty(0)
        return row_norms(weight if self.form == "folded" else fold(weight, deltas))


class _LoraLinear(torch.autograd.Function):
    """See :func:`lora_linear`.

    With g = dL/dy and W_eff the weight that x was multiplied by, dL/dx = g W_eff, to which the deltas add their share
    in the form `separate`; their own gradients are :meth:`qlora.kernels.Delta.gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, saved: torch.Tensor, call: _Call, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.saved, ctx.call = saved.grad_fn, call
        if call.source is not None:
            call.source.add_user()
        RecomputedWeights.take(call.base)  # of a backward that was aborted
        y, norms = call.product(rows, factors, lasting=RecomputedWeights.is_on() and ctx.needs_input_grad[0])
        ctx.mark_non_differentiable(norms)
        return y, norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _grad_norms: None) -> tuple[torch.Tensor | None, ...]:
        call, tensors = ctx.call, ctx.saved.saved_tensors
        factors, inputs = tensors[: call.num_factors], tensors[call.num_factors :]
        x = inputs[0] if call.source is None else call.source.build(*inputs)
        rows = filled_up(x.reshape(-1, x.shape[-1]))
        deltas, mask = call.deltas(factors, x.dtype), call.mask(rows)
        needs_x, _, _, *needed = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            weight = RecomputedWeights.take(call.base)
            grad_x = grad @ (call.weight(deltas, x.dtype) if weight is None else weight)
        share = grad_x if call.form == "separate" else None  # folded, the deltas are in the weight
        grads: list[torch.Tensor | None] = []
        remaining = iter(needed)
        for delta in deltas:
            own = list(islice(remaining, len(delta.tensors)))
            grads += (
                [None] * len(own) if share is None and not any(own) else delta.gradients(rows, grad, own, share, mask)
            )
        return grad_x, None, None, *grads
