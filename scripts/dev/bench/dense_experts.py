"""A slow and obvious reference for adapted experts: W + scaling · B A in dense autograd, by transformers' eager code.

It is next to the script that trains beside it, because a script can't import from tests; tests compare with it too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from qlora.nf4 import NF4Experts, NF4Linear


class WithUpdate(nn.Module):
    """W + scaling · B A of all experts.

    Args:
        A: (experts, rank, in).
        B: (experts, out, rank).
        scaling: Factor on the products.
        is_transposed: Whether an expert's weight is (in, out) instead of (out, in).
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scaling: float, is_transposed: bool) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.scaling, self.is_transposed = scaling, is_transposed

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the effective weights, like `weight`."""
        update = self.scaling * torch.bmm(self.B, self.A)
        return weight + (update.transpose(1, 2) if self.is_transposed else update).to(weight.dtype)


def adapt_experts(model: Any, experts: Iterable[tuple[str, Any]]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Give a plain model the updates of adapted stacks; return A and B by the names of the stacks."""
    factors = {}
    for name, adapted in experts:
        layer, _, part = name.rpartition(".")
        stored = adapted.stored()
        update = WithUpdate(stored.A, stored.B, stored.scaling, adapted.is_transposed)
        parametrize.register_parametrization(model.get_submodule(layer), part, update)
        factors[name] = (update.A, update.B)
    return factors


def copy_dequantized(model: Any, plain: Any) -> None:
    """Copy a model in 4 bits, dequantized, into one of the same architecture that transformers computes by itself."""
    for name, module in model.named_modules():
        name = name.removesuffix(".base")  # of an adapted layer
        if isinstance(module, NF4Linear):
            plain.get_submodule(name).weight.data = module.dequantize(plain.dtype)
        if isinstance(module, NF4Experts):
            weights = [module.dequantize(expert, plain.dtype) for expert in range(module.num_experts)]
            plain.get_parameter(name).data = torch.stack(weights)
    plain.set_experts_implementation("eager")
