"""Norms and gated products of a model, built again in the backward pass instead of being kept for it."""

from typing import Any

import torch
from torch import nn

from qlora.kernels import rebuilt

PROBE_ROWS = 4


class RebuiltNorm(nn.Module):
    """A norm whose output is not kept; its parameters keep their names."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._norm = (norm,)  # in a tuple, so that its parameters do not get a second name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, features) -> (…, features)."""
        return rebuilt(self._norm[0], x)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), of which the product is not kept (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden) -> (…, hidden)."""
        return self.down_proj(rebuilt(self._product, self.gate_proj(x), self.up_proj(x)))

    def _product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up


def rebuild_activations(model: nn.Module) -> int:
    """Replaces a model's norms and gated MLPs by ones that keep less and compute the same, bit for bit.

    What computes something else on a few random rows, or has parameters that are trained, is left as it is.

    Args:
        model: Of transformers.

    Returns:
        How many were replaced.
    """
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child)
            if replacement is not None:
                setattr(parent, name, replacement.train(child.training))
                num_replaced += 1
    return num_replaced


def _replacement(module: Any) -> nn.Module | None:
    if any(parameter.requires_grad for name, parameter in module.named_parameters() if "lora_" not in name):
        return None
    if type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not list(module.children()):
        return RebuiltNorm(module)
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} == set(dict(module.named_children())):
        replacement = GatedMLP(module)
        return replacement if _same(module, replacement) else None
    return None


@torch.no_grad()
def _same(module: Any, replacement: nn.Module) -> bool:
    """Whether two modules give the same for a few random rows: an MLP of these names may still do more with them."""
    linear = module.gate_proj
    features = linear.in_features
    generator = torch.Generator().manual_seed(0)
    reference = next(module.parameters())
    dtype = torch.float32 if not reference.dtype.is_floating_point else reference.dtype
    x = torch.randn(PROBE_ROWS, features, generator=generator).to(reference.device, dtype)
    return torch.equal(module(x), replacement(x))
