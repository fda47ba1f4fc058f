"""Norms and gated products that are recomputed in the backward pass instead of being saved for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qlora.kernels import (
    ACTIVATIONS,
    GatedProduct,
    RMSNorm,
    liger_twin,
    liger_unavailable_reason,
    liger_version,
    rebuilt,
)
from qlora.lora import lora_layers

PROBE_ROWS = 64
# Largest difference between two equal functions, as a share of a row's size: the order of a sum changes single last
# bits. A rounding at another step differs by hundreds of times as much.
TOLERANCE = 1e-5

Function = Callable[..., torch.Tensor]


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
        return self.down_proj(rebuilt(self._product, self.gate_proj(x), self.up_proj(x)))


def rebuild_activations(model: Any) -> str:
    """Replace a model's norms and gated MLPs by modules that save less and compute the same.

    A module is left unchanged if its replacement computes something else on a few random rows, or if it has trained
    parameters of its own. The rotary embedding is left unchanged too: attention calls it as a function of its Python
    module, which can't be replaced for one model only.

    Args:
        model: A model of transformers.

    Returns:
        What computes them now, for reports: `liger-kernel <version>`, `plain torch`, or both, and why.
    """
    chooser = _Chooser(model.device, model.dtype)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child, chooser)
            if replacement is not None:
                setattr(parent, name, replacement.train(child.training))
    return chooser.report()


def _replacement(module: Any, chooser: "_Chooser") -> nn.Module | None:
    factors = {factor for _, layer in lora_layers(module) for factor in layer.parameters(recurse=False)}
    if any(parameter.requires_grad and parameter not in factors for parameter in module.parameters()):
        return None
    if type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not list(module.children()):
        return RebuiltNorm(module, chooser.norm(module))
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} == set(dict(module.named_children())):
        x = chooser.random_rows(module.gate_proj.in_features)
        with torch.no_grad():
            product = module.act_fn(module.gate_proj(x)) * module.up_proj(x)
            is_all = is_close(module(x), module.down_proj(product), 0.0)
        return GatedMLP(module, chooser.product(module.act_fn, product.shape[-1])) if is_all else None
    return None


class _Chooser:
    """Choose the fastest function for each norm and product by trying them on random rows; keep the reasons."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)
        self._why_never = liger_unavailable_reason(device)
        self._why_plain = dict[str, None]()  # an ordered set
        self._liger_used = False

    def report(self) -> str:
        """Describe what was chosen, and why plain torch was."""
        plain = self._why_never or ", ".join(self._why_plain)
        parts = [f"liger-kernel {liger_version()}"] if self._liger_used else []
        if plain or not parts:
            parts.append(f"plain torch: {plain or 'there is nothing to compute'}")
        return "; ".join(parts)

    def norm(self, norm: Any) -> Function:
        """Return a function for a norm; the norm itself if its formula is not recognized."""
        weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if weight is None or weight.dim() != 1 or eps is None or getattr(norm, "bias", None) is not None:
            return norm
        sizes = torch.logspace(-3, 1, PROBE_ROWS)[:, None]  # the first are so small that eps matters
        x = self.random_rows(weight.shape[0], sizes).to(weight)
        try:
            norm(x)
        except (RuntimeError, ValueError):  # its rows are split, as into xLSTM's heads
            return norm
        forms = [RMSNorm(weight, eps, rounds_first=True), RMSNorm(weight, eps), RMSNorm(weight, eps, offset=1.0)]
        return self._choose(type(norm).__name__, norm, forms, x)

    def product(self, act_fn: Function, features: int) -> Function:
        """Return a function for act_fn(gate) · up."""

        def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return act_fn(gate) * up

        forms = [GatedProduct(activation) for activation in ACTIVATIONS]
        gate, up = self.random_rows(features), self.random_rows(features)
        return self._choose(type(act_fn).__name__, product, forms, gate, up)

    def random_rows(self, features: int, sizes: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return (rows, features), in the model's dtype and on its device."""
        rows = torch.randn(PROBE_ROWS, features, generator=self._generator) * sizes
        return rows.to(self._device, self._dtype)

    def _choose(self, name: str, own: Function, forms: list[Any], *inputs: torch.Tensor) -> Function:
        plain = next((form for form in forms if _same(form, own, *inputs)), own)
        if self._why_never is not None:
            return plain
        try:
            liger = liger_twin(plain)
            if liger is not None and _same(liger, own, *inputs):
                self._liger_used = True
                return liger
            reason = "has no" if liger is None else "gives something else for"
        except Exception as error:  # a kernel compiler can fail in any way, and plain torch works without it
            reason = f"fails ({type(error).__name__}: {error}) for"
        self._why_plain[f"liger-kernel {reason} {name}"] = None
        return plain


def _same(function: Function, own: Function, *inputs: torch.Tensor) -> bool:
    """Return whether a function has the results of the model's own, and its gradients within the dtype's precision."""
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    with torch.enable_grad():
        found, expected = rebuilt(function, *inputs), own(*inputs)
    if found.dtype != expected.dtype or not is_close(found, expected, TOLERANCE):
        return False
    grad_output = inputs[-1].detach().flip(0, 1)
    gradients = (torch.autograd.grad(result, inputs, grad_output) for result in (found, expected))
    tolerance = max(TOLERANCE, torch.finfo(expected.dtype).eps)
    return all(is_close(one, other, tolerance) for one, other in zip(*gradients, strict=True))


def is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether the rows of two tensors differ by at most a share of their size, on average."""
    if found.is_meta:  # there are no values to compare
        return True
    found, expected = found.detach().float(), expected.detach().float()
    sizes = expected.abs().sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)
    return ((found - expected).abs().sum(-1) / sizes).mean().item() <= tolerance
