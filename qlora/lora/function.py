"""The autograd function of adapted linear layers, in two forms; saves x, or its recipe's inputs, and no weight."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import Delta, fill_up_rows, fold, recipe_of, row_norms, save_first, scale_rows, scratch
from qlora.kernels.rebuild import Source
from qlora.lora.spec import FORMS

# Tokens from which folding is the faster form, by type of device. Measured on two CPU cores at rank 16
# (docs/benchmarks/forms.md). Derived for CUDA, not measured: folding costs as much as `rank` more tokens and needs
# no pass over activations, so only the kernel launches of small batches make it slower.
FOLD_FROM_TOKENS = {"cpu": 2048, "cuda": 512}

Taken = TypeVar("Taken")


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


class Product(NamedTuple):
    """A product of an input with the weight of an adapted layer.

    Attributes:
        base: The frozen layer: `nn.Linear`, or one with `bias` and `weight_for_product`.
        deltas: Terms added to its weight; tensors that do not require a gradient get none.
        form: `auto`, `separate` or `folded`.
        dropout: Probability of dropping an input of the deltas.
        seed: Seed of the dropout.
    """

    base: Any
    deltas: Sequence[Delta]
    form: str = "auto"
    dropout: float = 0.0
    seed: int = 0


def lora_linears(x: torch.Tensor, products: Sequence[Product]) -> list[torch.Tensor]:
    """Compute y = x (W + Σ deltas)ᵀ + bias for each product, with dropout on the x of the deltas (arXiv:2106.09685).

    `separate` computes the products with W and with the deltas one after the other; `folded` rounds the effective
    weight once and computes one product. In the backward, x is read or rebuilt once for all products. The gradients
    have the bits of products that are computed one by one.

    Args:
        x: (..., in). If it has the attribute `recipe`, the recipe's inputs are saved instead of it.
        products: At least one.

    Returns:
        (..., out) for each, in the dtype of `x`, in which all products are computed.
    """
    return _products(x, products)[0]


def dora_linear(x: torch.Tensor, product: Product, magnitude: torch.Tensor) -> torch.Tensor:
    """Compute y = x (c ∘ (W + Σ deltas))ᵀ + bias, with c = magnitude / ‖W + Σ deltas‖ (DoRA, arXiv:2402.09353, eq. 5).

    It saves the product before the scale in addition to x: without it, the gradient of the magnitude would take
    another product with the whole weight.

    Args:
        x: See :func:`lora_linears`.
        product: The product.
        magnitude: (out,), fp32: norms of the rows of the effective weight.
    """
    (y,), (norms,) = _products(x, [product], needs_norms=True)
    bias = None if product.base.bias is None else product.base.bias.to(y.dtype)
    return scale_rows(y.flatten(0, -2), magnitude, norms, bias).view(y.shape)


def _products(
    x: torch.Tensor, products: Sequence[Product], needs_norms: bool = False
) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
    """Return each x (W + Σ deltas)ᵀ + bias, and the norms of each weight's rows if needed."""
    rows = x.reshape(-1, x.shape[-1])
    recipe = recipe_of(x)
    factors = [factor for product in products for delta in product.deltas for factor in delta.tensors]
    calls = [
        _Call(
            base=product.base,
            makers=tuple((delta.make, len(delta.tensors)) for delta in product.deltas),
            needs_norms=needs_norms,
            form=choose_form(product.form, len(rows), x.device, product.dropout, needs_norms),
            dropout=product.dropout,
            seed=product.seed,
        )
        for product in products
    ]
    filled = fill_up_rows(rows)
    if torch.is_grad_enabled():
        # First, so that a recomputation ends here where these products are the last of its region.
        saved = save_first(*factors, *((x,) if recipe is None else recipe.inputs))
        found = _LoraLinears.apply(filled, saved, calls, None if recipe is None else recipe.source, *factors)
        ys, norms = found[: len(calls)], found[len(calls) :]
    else:  # for a single token, the bookkeeping of a backward takes as long as the product
        ys, norms = _compute(calls, factors, filled)
    if filled is not rows:
        ys = [y[: len(rows)] for y in ys]
    # Outside the function: a view made inside one must not be modified in place, which some models do to an output.
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys], norms


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
    """

    base: Any
    makers: tuple[tuple[Callable[..., Delta], int], ...]
    needs_norms: bool
    form: str
    dropout: float
    seed: int

    def take(self, remaining: Iterator[Taken]) -> list[Taken]:
        """Take what belongs to the deltas' tensors from the values that are left of those of several calls."""
        return list(islice(remaining, sum(number for _, number in self.makers)))

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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x (W + Σ deltas)ᵀ + bias, and the norms of the effective weight's rows, or None if not needed.

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
        if not self.needs_norms:
            return y, None
        return y, row_norms(weight if self.form == "folded" else fold(weight, deltas))

    def gradients(
        self,
        deltas: Sequence[Delta],
        rows: torch.Tensor,
        grad: torch.Tensor,
        needed: Sequence[bool],
        grad_x: torch.Tensor | None,
    ) -> Iterator[torch.Tensor | None]:
        """Yield the gradient of each of the deltas' tensors, and add their share to that of x in the form `separate`.

        Args:
            deltas: All deltas.
            rows: x, (rows, in).
            grad: Gradient of the output, (rows, out).
            needed: Whether the gradient of each of the tensors is needed.
            grad_x: Gradient of x; None if it is not needed.
        """
        share = grad_x if self.form == "separate" else None  # folded, the deltas are in the weight
        mask, remaining = self.mask(rows), iter(needed)
        for delta in deltas:
            own = list(islice(remaining, len(delta.tensors)))
            yield from (
                [None] * len(own) if share is None and not any(own) else delta.gradients(rows, grad, own, share, mask)
            )


def _compute(
    calls: Sequence[_Call], factors: Sequence[torch.Tensor], rows: torch.Tensor, lasting: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the product of each call, see :meth:`_Call.product`, and the norms of those that need them."""
    remaining = iter(factors)
    found = [call.product(rows, call.take(remaining), lasting) for call in calls]
    return [y for y, _ in found], [norms for _, norms in found if norms is not None]


class _LoraLinears(torch.autograd.Function):
    """See :func:`lora_linears`.

    With g = dL/dy and W_eff the weight that x was multiplied by, dL/dx = Σ g W_eff, to which the deltas add their share
    in the form `separate`; their own gradients are :meth:`qlora.kernels.Delta.gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        saved: torch.Tensor,
        calls: Sequence[_Call],
        source: Source | None,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        # `source` builds x again from the saved tensors; it is None if x itself is saved.
        ctx.saved, ctx.calls, ctx.source = saved.grad_fn, calls, source
        if source is not None:
            source.add_user()
        for call in calls:
            RecomputedWeights.take(call.base)  # of a backward that was aborted
        lasting = RecomputedWeights.is_on() and ctx.needs_input_grad[0]
        ys, norms = _compute(calls, factors, rows, lasting)
        ctx.mark_non_differentiable(*norms)
        ctx.set_materialize_grads(False)  # the norms have none, and zeros in place of it would be written each time
        return *ys, *norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        calls, (needs_x, _, _, _, *needed) = ctx.calls, ctx.needs_input_grad
        tensors: tuple[torch.Tensor, ...] = ctx.saved.saved_tensors
        factors, inputs = iter(tensors[: len(needed)]), tensors[len(needed) :]
        x = inputs[0] if ctx.source is None else ctx.source.build(*inputs)
        rows, remaining = fill_up_rows(x.reshape(-1, x.shape[-1])), iter(needed)
        taken = [(call, call.take(factors), call.take(remaining)) for call in calls]
        grad_x, found = None, list[list[torch.Tensor | None]]()
        # In autograd's order and with its roundings, as for layers that are called one by one because of hooks.
        for (call, own_factors, asked), grad in zip(reversed(taken), reversed(grads[: len(calls)]), strict=True):
            if grad is None:  # its output is not used
                found.append([None] * len(asked))
                continue
            deltas, own = call.deltas(own_factors, x.dtype), None
            if needs_x:
                weight = RecomputedWeights.take(call.base)
                own = grad @ (call.weight(deltas, x.dtype) if weight is None else weight)
            found.append([*call.gradients(deltas, rows, grad, asked, own)])
            if own is not None:
                grad_x = own if grad_x is None else grad_x.add_(own)
        return grad_x, None, None, None, *chain.from_iterable(reversed(found))
