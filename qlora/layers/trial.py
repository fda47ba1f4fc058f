"""Faster functions in place of a model's own, each tried on random rows before it is used."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qlora.kernels import ACTIVATIONS, GatedProduct, RMSNorm, rebuilt, rotate, unfused_reason
from qlora.out_of_memory import is_out_of_memory

PROBE_ROWS, TRIED_HEADS = 64, 2
# Largest difference between two equal functions, as a share of a row's size: the order of a sum changes single last
# bits. A rounding at another step differs by hundreds of times as much.
TOLERANCE = 1e-5

Function = Callable[..., torch.Tensor]


class Chooser:
    """Choose the fastest function for each norm, product and rotation by trying them on random rows; keep the reasons.

    Args:
        device: Device of the model.
        dtype: Compute dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)
        self._why_never = unfused_reason(device)
        self._why_plain = dict[str, None]()  # an ordered set
        self._is_fused = False
        self._rotations: dict[int, bool] = {}

    def report(self) -> str:
        """Describe what was chosen, and why plain torch was."""
        plain = self._why_never or ", ".join(self._why_plain)
        parts = ["fused kernels"] if self._is_fused else []
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

    def fuses_rotation(self, width: int) -> bool:
        """Return whether a kernel rotates heads of a width."""
        if self._why_never is None and width not in self._rotations:
            inputs = [self.random_rows(TRIED_HEADS * width).view(1, PROBE_ROWS, -1, width) for _ in range(2)]
            cos, sin = (self.random_rows(width).unsqueeze(0) for _ in range(2))

            def rotated(fused: bool, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return torch.add(*rotate(query, key, cos, sin, fused))

            self._rotations[width] = self._takes("rotations", partial(rotated, True), partial(rotated, False), *inputs)
        return self._rotations.get(width, False)

    def random_rows(self, features: int, sizes: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return (rows, features), in the model's dtype and on its device."""
        rows = torch.randn(PROBE_ROWS, features, generator=self._generator) * sizes
        return rows.to(self._device, self._dtype)

    def _choose(self, name: str, own: Function, forms: list[Any], *inputs: torch.Tensor) -> Function:
        plain = next((form for form in forms if _same(form, own, *inputs)), None)
        if plain is None:
            self._why_plain[f"there is no fused kernel for {name}"] = None
            return own
        if self._why_never is not None:
            return plain
        fused = replace(plain, fused=True)
        return fused if self._takes(name, fused, own, *inputs) else plain

    def _takes(self, name: str, fused: Function, own: Function, *inputs: torch.Tensor) -> bool:
        """Return whether a fused kernel does the same as the model's own function; otherwise note why not."""
        try:
            if _same(fused, own, *inputs):
                self._is_fused = True
                return True
            reason = "gives something else"
        except Exception as error:  # a kernel compiler can fail in any way, and plain torch works without it
            if is_out_of_memory(error):
                raise
            reason = f"fails ({type(error).__name__}: {error})"
        self._why_plain[f"the fused kernel for {name} {reason}"] = None
        return False


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
