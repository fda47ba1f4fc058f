"""Faster functions in place of a model's own, each tried on random rows before it is used."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from qlora.hooks import has_hooks
from qlora.kernels import ACTIVATIONS, GatedProduct, RMSNorm, describe_failure, rebuilt, rotate, unfused_reason

# Rows of a trial. Kernels are compiled apart for numbers of values that are multiples of 16, and mask the last rows of
# a tile, so that they are tried on all of these rows and on all but the last.
PROBE_ROWS = 65
# Largest difference between two equal functions, as a share of a row's size: the order of a sum changes single last
# bits. A rounding at another step differs by hundreds of times as much.
TOLERANCE = 1e-5

# Features that stand-ins of linear layers read, and the size of the smallest rows that they get, as a power of ten.
FEATURES, SMALLEST = 16, -2

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
        self._reason_never = unfused_reason(device)
        self._reasons = dict[str, str]()  # why plain torch is used, by the name of what it computes
        self._is_fused = False
        self._rotations: dict[int, bool] = {}
        self._hooked = dict[str, None]()  # kinds of modules with hooks, in the model's order

    def report(self) -> str:
        """Return what was chosen, and after `: ` why plain torch was."""
        chosen, reasons = "fused kernels" if self._is_fused else "plain torch", list(self._reasons.values())
        if self._reason_never is not None:
            reasons = [self._reason_never]
        elif self._is_fused and reasons:
            chosen += f"; plain torch for {', '.join(self._reasons)}"
        elif not self._is_fused and not reasons:
            reasons = ["there is nothing to compute"]
        if self._hooked:
            chosen += f"; {', '.join(self._hooked)} with hooks not replaced"
        return ": ".join([chosen, *([", ".join(dict.fromkeys(reasons))] if reasons else [])])

    def may_replace(self, module: Any, *parts: Any) -> bool:
        """Return whether a module may be replaced: not if it has hooks, which its replacement would not call.

        Args:
            module: The module.
            parts: Modules in it that its replacement would not call either.
        """
        if any(map(has_hooks, (module, *parts))):
            self._hooked[type(module).__name__] = None
            return False
        return True

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
        sizes = torch.logspace(-2, 2, PROBE_ROWS)[:, None]  # an activation may clip large values (GELU at 10)
        gate, up = self.random_rows(features, sizes), self.random_rows(features)
        return self._choose(type(act_fn).__name__, product, forms, gate, up)

    def fuses_rotation(self, width: int) -> bool:
        """Return whether a kernel rotates heads of a width."""
        if self._reason_never is None and width not in self._rotations:
            query, key = self.random_rows(2 * width), self.random_rows(width)
            cos, sin = self.random_rows(width), self.random_rows(width)

            def rotated(fused: bool, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                batch = 5 if len(query) % 2 else 4  # its rows share their angles
                shape = batch, len(query) // batch, -1, width
                angles = cos[None, : shape[1]], sin[None, : shape[1]]
                return torch.cat(rotate(query.view(shape), key.view(shape), *angles, fused), dim=2)

            self._rotations[width] = self._takes(
                f"rotations of {width} features", partial(rotated, True), partial(rotated, False), query, key
            )
        return self._rotations.get(width, False)

    def random_rows(self, features: int, sizes: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return (rows, features), in the model's dtype and on its device."""
        rows = torch.randn(PROBE_ROWS, features, generator=self._generator) * sizes
        return rows.to(self._device, self._dtype)

    def linear(self, inputs: int = FEATURES, outputs: int = FEATURES) -> Function:
        """Return a random linear function, (…, inputs) -> (…, outputs), for :func:`stand_ins`."""
        return partial(F.linear, weight=self.draw(outputs, inputs, sizes=inputs**-0.5))

    def rows(self, largest: int) -> torch.Tensor:
        """Return inputs of a stand-in, (1, PROBE_ROWS, FEATURES), of very different sizes.

        Args:
            largest: Size of the largest rows, as a power of ten. Where something is clipped, they show it; results that
                are larger than fp16's numbers would show nothing.
        """
        sizes = torch.logspace(SMALLEST, largest, PROBE_ROWS)[:, None]
        return self.draw(PROBE_ROWS, FEATURES, sizes=sizes).unsqueeze(0)

    def draw(self, *shape: int, sizes: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Return a random tensor in the model's dtype and on its device; on the CPU if that is the meta device."""
        device = torch.device("cpu") if self._device.type == "meta" else self._device
        return (torch.randn(shape, generator=self._generator) * sizes).to(device, self._dtype)

    def _choose(self, name: str, own: Function, forms: list[Any], *inputs: torch.Tensor) -> Function:
        plain = next((form for form in forms if _same(form, own, *inputs)), None)
        if plain is None:
            self._reasons[name] = f"there is no fused kernel for {name}"
            return own
        if self._reason_never is not None:
            return plain
        fused = replace(plain, fused=True)
        return fused if self._takes(name, fused, plain, *inputs) else plain

    def _takes(self, name: str, fused: Function, plain: Function, *inputs: torch.Tensor) -> bool:
        """Return whether a fused kernel does the same as plain torch; otherwise note why not."""
        try:
            if all(_fuses(fused, plain, *(each[:rows] for each in inputs)) for rows in (PROBE_ROWS, PROBE_ROWS - 1)):
                self._is_fused = True
                return True
            reason = "gives something else"
        except Exception as error:  # a kernel compiler can fail in any way, and plain torch works without it
            reason = f"fails ({describe_failure(error)})"
        self._reasons[name] = f"the fused kernel for {name} {reason}"
        return False


def stand_ins(module: Any, children: Mapping[str, Any]) -> list[Any]:
    """Return copies of a module with other children, so that it can be tried without the model's values.

    One is in evaluation mode and one in training mode, in which a module may compute something else, such as dropout.
    """
    copies = []
    for is_training in (False, True):
        copied = copy.copy(module)
        copied._modules, copied.training = dict(children), is_training
        copies.append(copied)
    return copies


def _same(function: Function, own: Function, *inputs: torch.Tensor) -> bool:
    """Return whether a function has the results of the model's own, and its gradients within the dtype's precision."""
    (found, *gradients), (expected, *own_gradients) = _with_gradients(partial(rebuilt, function), own, *inputs)
    if found.dtype != expected.dtype or not is_close(found, expected, TOLERANCE):
        return False
    tolerance = max(TOLERANCE, torch.finfo(expected.dtype).eps)  # the model's own may round them several times
    return all(is_close(one, other, tolerance) for one, other in zip(gradients, own_gradients, strict=True))


def _fuses(fused: Function, plain: Function, *inputs: torch.Tensor) -> bool:
    """Return whether a kernel has the results and gradients of its form in plain torch, which rounds at the same steps.

    They differ by a few last bits at most.
    """
    pairs = zip(*_with_gradients(partial(rebuilt, fused), partial(rebuilt, plain), *inputs), strict=True)
    return all(one.dtype == other.dtype and is_last_bits(one, other) for one, other in pairs)


def _with_gradients(function: Function, other: Function, *inputs: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return the result of each of two functions with the gradients of their inputs, for the same gradient of it."""
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    with torch.enable_grad():
        results = function(*inputs), other(*inputs)
    grad_output = results[1].detach().flip(0, -1)
    return [(result.detach(), *torch.autograd.grad(result, inputs, grad_output.to(result.dtype))) for result in results]


def is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether the rows of two tensors differ by at most a share of their size, on average."""
    if found.is_meta:  # there are no values to compare
        return True
    found, expected = found.detach().float(), expected.detach().float()
    sizes = expected.abs().sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)
    return ((found - expected).abs().sum(-1) / sizes).mean().item() <= tolerance


def is_last_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors differ in few values, and nowhere by more than two roundings of the dtype.

    A value is also compared with its row's size, because sums of terms that cancel lose digits.
    """
    if found.is_meta:
        return True
    limits = torch.finfo(expected.dtype)
    one, other = found.detach().float(), expected.detach().float()
    allowed = other.abs() * max(2 * limits.eps, TOLERANCE) + limits.smallest_normal * limits.eps
    allowed += other.abs().mean(-1, keepdim=True) * TOLERANCE
    on_average = TOLERANCE + 8 * limits.eps / other.numel()  # where there are few values, one last bit counts for more
    return bool(((one - other).abs() <= allowed).all()) and is_close(found, expected, on_average)
