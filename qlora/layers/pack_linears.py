"""Linear layers packed for products with few rows, such as those of the next token of an answer.

A token's time goes into reading the weights, and into the calls for an adapter's two small products. So the weight is
packed (:mod:`qlora.kernels.packed`) with the rows of A below its own: one product gives both W x and A x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qlora.kernels import LowRank, PackedWeight, can_pack, fill_up_rows
from qlora.lora import LoraLinear, output_head
from qlora.lora.function import choose_form
from qlora.nf4 import NF4Linear


class PackedLinear(nn.Module):
    """A linear layer in evaluation mode that multiplies by its packed weight; the outputs are the same to a rounding.

    The layer itself computes what is not packed here: with gradients, in other dtypes, with the update folded into the
    weight, and where the adapters are switched. Its attributes are found here too, such as the `weight` of a head whose
    dtype a model reads.

    Args:
        layer: `LoraLinear` whose terms are of low rank, `NF4Linear` or `nn.Linear`.
        base: The layer that holds its frozen weight, which may be `layer` itself.
    """

    def __init__(self, layer: Any, base: Any) -> None:
        super().__init__()
        self.layer = layer
        terms = [term.to(torch.bfloat16) for term in _terms(layer)]
        self._adapted = (layer,) if isinstance(layer, LoraLinear) else ()  # a tuple is no submodule
        self._form = layer.spec.form if terms else "separate"
        self._sizes = [base.out_features, *(len(term.A) for term in terms)]
        self._outer = [(term.B.detach().T, term.scaling) for term in terms]
        weight = base.weight_for_product(torch.bfloat16) if isinstance(base, NF4Linear) else base.weight.detach()
        bias = None if base.bias is None else F.pad(base.bias.detach().to(weight.dtype), (0, sum(self._sizes[1:])))
        if terms:
            weight = torch.cat([weight, *(term.A.detach() for term in terms)])
        self._packed = PackedWeight(weight, bias)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer that this one has not."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # before it is set
                raise
            return getattr(self.layer, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        rows = x.reshape(-1, x.shape[-1])
        is_folded = choose_form(self._form, len(rows), x.device, 0.0) == "folded"
        is_switched = any(layer.is_off or layer.is_at_start for layer in self._adapted)
        if is_folded or is_switched or torch.is_grad_enabled() or x.dtype != torch.bfloat16:
            return self.layer(x)
        y, *inner = self._packed.product(fill_up_rows(rows)).split(self._sizes, dim=1)
        for u, (B, scaling) in zip(inner, self._outer, strict=True):
            y = torch.addmm(y, u, B, alpha=scaling)
        return y[: len(rows)].reshape(*x.shape[:-1], y.shape[-1])


@contextmanager
def pack_linears(model: Any, num_bytes: float) -> Iterator[float]:
    """Replace as many linear layers as fit by packed ones until the context ends, the output head included.

    Layers that are not always in memory, and adapters other than plain factors, are left as they are.

    Args:
        model: A model that is not changed in the context.
        num_bytes: Number of bytes that may be taken.

    Yields:
        The bytes that are left.
    """
    head = output_head(model)
    packed, places = dict[nn.Module, PackedLinear](), list[tuple[nn.Module, str, nn.Module]]()
    parents = list(model.modules()) if can_pack(model.device, model.dtype) else []
    try:
        for parent in parents:
            for name, layer in list(parent.named_children()):
                base = None if isinstance(parent, LoraLinear | PackedLinear) else _packable_base(layer, head)
                if base is None:
                    continue
                kept, passing = _num_bytes(layer, base)
                if layer not in packed and kept + passing <= num_bytes:
                    num_bytes -= kept
                    packed[layer] = PackedLinear(layer, base)
                if layer in packed:
                    places.append((parent, name, layer))
                    setattr(parent, name, packed[layer])
        yield num_bytes
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def _packable_base(layer: Any, head: nn.Module | None) -> Any:
    """Return the layer whose frozen weight can be packed for `layer`; None if none can.

    It can for products x (W + Σ B A)ᵀ + bias that are not always computed with the update folded into W.
    """
    if isinstance(layer, LoraLinear):
        is_plain = layer.spec.kind == "lora" and layer.spec.form != "folded"
        base = layer.base if is_plain and not layer.is_off and not layer.is_at_start else None
    else:
        base = layer if isinstance(layer, NF4Linear) or layer is head else None  # models read the weights of others
    if isinstance(base, NF4Linear):
        return base if base.before_read is None else None
    return base if type(base) is nn.Linear else None


def _terms(layer: Any) -> list[LowRank]:
    """Return the terms that a layer adds to its frozen weight; an adapter of the kind `lora` has low-rank ones."""
    return [term for term in layer.deltas if isinstance(term, LowRank)] if isinstance(layer, LoraLinear) else []


def _num_bytes(layer: Any, base: Any) -> tuple[int, int]:
    """Return the bytes of a layer's packed weight, with the rows of A, and of what is freed once it is packed.

    That is the dequantized weight, and a copy of the weight with the rows of A below it.
    """
    num_added = sum(len(term.A) for term in _terms(layer))
    weight, added = (2 * base.in_features * number for number in (base.out_features, num_added))
    dequantized = weight if isinstance(base, NF4Linear) and not base.is_cached else 0
    return weight + added, dequantized + (weight + added if added else 0)
