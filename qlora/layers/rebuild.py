"""Norms and gated products that are recomputed in the backward pass instead of being saved for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qlora.kernels import GatedProduct, rebuilt
from qlora.layers.self_attention import fit_self_attention
from qlora.layers.trial import Chooser, Function, is_close, stand_ins
from qlora.lora import linears_of, lora_layers
from qlora.out_of_memory import is_out_of_memory

# Children of a gated MLP.
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class RebuiltNorm(nn.Module):
    """A norm whose output is not saved; its parameters keep their names.

    Args:
        norm: The norm.
        function: Function that computes it; the norm itself if there is no faster one.
    """

    def __init__(self, norm: nn.Module, function: Function) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._function = (function,)  # in a tuple, so that the norm's parameters do not get a second name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, features) to (…, features)."""
        return rebuilt(self._function[0], x)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), whose product is not saved (SwiGLU, arXiv:2002.05202).

    Args:
        mlp: A module with these linear layers and `act_fn`.
        product: Function that computes act(gate) · up.
    """

    def __init__(self, mlp: Any, product: Function) -> None:
        super().__init__()
        # The product's gradient comes from down_proj only and is not used elsewhere.
        self._product = replace(product, overwrites=True) if isinstance(product, GatedProduct) else product
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        # Function with which a level of recomputation calls `compute` in training.
        self.run: Callable[[GatedMLP, torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, hidden) to (…, hidden)."""
        return self.compute(x) if self.run is None or not self.training else self.run(self, x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the forward without recomputation."""
        return self.down_proj(rebuilt(self._product, *linears_of(x, (self.gate_proj, self.up_proj))))


def rebuild_activations(model: Any) -> str:
    """Replace a model's norms, gated MLPs and self-attention by modules that save less and compute the same.

    A module is left unchanged if its replacement computes something else on a few random rows, in training or in
    evaluation, or if it has hooks; norms and MLPs also if they have trained parameters of their own.

    Args:
        model: A model of transformers.

    Returns:
        What computes them now, for reports: fused kernels, plain torch, or both, what stays because of hooks, and why
        plain torch is used.
    """
    chooser = Chooser(model.device, model.dtype)
    for find in (_smaller, fit_self_attention):  # attention last, because its norms are among the replaced ones
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                replacement = find(child, chooser)
                if replacement is not None:
                    setattr(parent, name, replacement.train(child.training))
    return chooser.report()


def _smaller(module: Any, chooser: Chooser) -> nn.Module | None:
    """Return a module that saves less than a norm or gated MLP, or None if there is none."""
    factors = {factor for _, layer in lora_layers(module) for factor in layer.parameters(recurse=False)}
    if any(parameter.requires_grad and parameter not in factors for parameter in module.parameters()):
        return None
    names = set(dict(module.named_children()))
    is_norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not names
    if not (is_norm or names == GATED):
        return None
    uncalled = () if is_norm else (module.act_fn,)  # the linear layers are called as before
    if not chooser.may_replace(module, *uncalled):
        return None
    if is_norm:
        return RebuiltNorm(module, chooser.norm(module))
    gate, up, down = (chooser.linear() for _ in range(3))
    # No model has a sine of its own, so it shows whether `act_fn` is called; and it keeps the products of large values,
    # which show whether they are clipped, among fp16's numbers.
    children = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": torch.sin}
    x = chooser.rows(largest=3)
    try:
        with torch.no_grad():
            expected = down(torch.sin(gate(x)) * up(x))
            is_all = all(is_close(copied(x), expected, 0.0) for copied in stand_ins(module, children))
        features = module.gate_proj.out_features
    except Exception as error:  # any error of a module's own code may say that it does something else
        if is_out_of_memory(error):
            raise
        return None
    return GatedMLP(module, chooser.product(module.act_fn, features)) if is_all else None
