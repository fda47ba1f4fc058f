"""Adapted experts in dense autograd: each fused weight is W + scaling · B A, which transformers' eager code reads."""

import torch
from torch import nn
from torch.nn.utils import parametrize


class WithUpdate(nn.Module):
    """W + scaling · B A for all experts, (experts, out, in), or (experts, in, out) if transposed."""

    def __init__(self, A, B, scaling, is_transposed):
        super().__init__()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.scaling, self.is_transposed = scaling, is_transposed

    def forward(self, weight):
        update = self.scaling * torch.bmm(self.B, self.A)
        return weight + (update.transpose(1, 2) if self.is_transposed else update)


def adapt_experts(model, experts):
    """Give a plain model the updates of adapted stacks; return the factors by the names of the stacks."""
    factors = {}
    for name, adapted in experts:
        layer, _, part = name.rpartition(".")
        stored = adapted.stored()
        update = WithUpdate(stored.A, stored.B, stored.scaling, adapted.is_transposed)
        parametrize.register_parametrization(model.get_submodule(layer), part, update)
        factors[name] = (update.A, update.B)
    return factors
