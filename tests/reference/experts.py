"""Adapted experts in dense autograd: each fused weight is W + scaling · B A, which transformers' eager code reads.

And a layer of experts, token by token.
"""

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


def experts_layer(x, index, scores, up, down, up_bias, down_bias, gate):
    """Return the sum over a token's experts of score · down(gate(up(x))); experts that are not there add nothing.

    The weights are (experts, out, in), and the biases (experts, out).
    """
    rows = []
    for token, experts, of_experts in zip(x, index.tolist(), scores, strict=True):
        row = torch.zeros_like(token)
        for expert, score in zip(experts, of_experts, strict=True):
            if expert < len(up):
                hidden = gate((up[expert] @ token + up_bias[expert])[None])[0]
                row = row + score * (down[expert] @ hidden + down_bias[expert])
        rows.append(row)
    return torch.stack(rows)
