"""NF4Linear: a frozen linear layer that holds 4-bit weights and dequantizes on the fly."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qlora.kernels import Delta, LowRank, fill_up_rows, fold, scratch
from qlora.nf4.checkpoint import from_checkpoint_tensors
from qlora.nf4.quantize import dequantize, nf4_num_bytes, quantize, set_statistics, statistics

# Error for a weight that is not in memory all the time.
PLACED = "weights that are split over processes or on the host can't be {}; load the base with weights='device'"


class _DequantizedLinear(torch.autograd.Function):
    """x @ W.T + bias for a frozen W; saves nothing, and dequantizes W again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: "NF4Linear") -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad_output @ ctx.linear.weight_for_product(grad_output.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer in NF4.

    bitsandbytes' own `Linear4bit` is never used in a forward: its inference path repacks the weight in place
    on some CPUs, which makes gradients and saved files wrong.

    Args:
        packed: Codes, uint8, as :func:`qlora.nf4.quantize` gives them.
        quant_state: The blocks' statistics; its shape is (out_features, in_features).
        bias: (out_features,) or None.

    Attributes:
        before_read: Called before the codes are read, where they are not always in memory; None where they are.
    """

    in_features: int
    out_features: int
    before_read: Callable[[], None] | None = None

    def __init__(self, packed: torch.Tensor, quant_state: Any, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.quant_state = quant_state
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = quant_state.shape
        self._cached: torch.Tensor | None = None

    @classmethod
    def from_linear(cls, linear: Any, double_quant: bool = True) -> "NF4Linear":
        """Quantize an `nn.Linear`, or take over the weight of bitsandbytes' `Linear4bit` without copying."""
        weight, bias = linear.weight, linear.bias
        state = getattr(weight, "quant_state", None)
        # A plain tensor sheds bitsandbytes' parameter class, whose `.to()` would quantize again.
        packed = weight.data.as_subclass(torch.Tensor)
        if state is None:
            packed, state = quantize(packed, double_quant)
        return cls(packed, state, None if bias is None else bias.data)

    def dequantize(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight, (out_features, in_features), in `dtype`."""
        self.ensure_present()
        return dequantize(self.weight, self.quant_state, dtype, out)

    def weight_for_product(
        self, dtype: torch.dtype, deltas: Sequence[Delta] = (), lasting: bool = False
    ) -> torch.Tensor:
        """Return the weight for a product that starts at once; read it only.

        Args:
            dtype: Dtype of the result.
            deltas: Terms added to the weight in `dtype`, see :func:`qlora.kernels.fold`.
            lasting: Whether the result is needed for longer; otherwise the next call may overwrite it.

        Returns:
            (out_features, in_features).
        """
        on_cpu, cached = not self.weight.is_cuda, self._cached
        if cached is not None and cached.dtype != dtype:
            cached = None
        if cached is not None and not deltas:
            return cached
        # bitsandbytes returns a new tensor on CPUs, regardless of `out`.
        is_new = lasting or (on_cpu and cached is None)
        out = None if is_new else scratch(self.quant_state.shape, dtype, self.weight.device)
        if cached is not None and on_cpu:
            return fold(cached, deltas, out)
        self.ensure_present()
        # On a GPU the fused kernel reads fewer bytes of codes than of a cached weight; it adds one low-rank term.
        first = next((delta for delta in deltas if isinstance(delta, LowRank)), None)
        others = [delta for delta in deltas if delta is not first]
        weight = dequantize(self.weight, self.quant_state, dtype, out, first)
        return fold(weight, others, out=weight)

    def cache_weight(self, dtype: torch.dtype) -> None:
        """Keep the dequantized weight for products in `dtype`: 2 bytes per parameter in 16 bits."""
        self._cached = self.dequantize(dtype)

    def uncache_weight(self) -> None:
        """Undo :meth:`cache_weight`."""
        self._cached = None

    @property
    def is_cached(self) -> bool:
        """Whether the dequantized weight is cached."""
        return self._cached is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of `x`."""
        rows = x.reshape(-1, x.shape[-1])
        filled = fill_up_rows(rows)
        given = x if filled is rows else filled
        y = _DequantizedLinear.apply(given, self) if torch.is_grad_enabled() else self.product(given)
        return y if filled is rows else y[: len(rows)].view(*x.shape[:-1], -1)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Compute :meth:`forward` without a gradient."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight_for_product(x.dtype), bias)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @property
    def statistics(self) -> list[torch.Tensor]:
        """The tensors that dequantize the codes."""
        return statistics(self.quant_state)

    @property
    def packed(self) -> list[torch.Tensor]:
        """The codes and their statistics, which :meth:`use_packed` replaces."""
        return [self.weight.data, *self.statistics]

    def use_packed(self, tensors: Sequence[torch.Tensor]) -> None:
        """Use other tensors in place of :attr:`packed`, with the same shapes and dtypes."""
        self.weight.data, *others = tensors
        set_statistics(self.quant_state, others)

    def ensure_present(self) -> None:
        """Have the codes and their statistics in memory until other weights are read."""
        if self.before_read is not None:
            self.before_read()

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the weight and its statistics."""
        return nf4_num_bytes(self.weight, self.quant_state)

    def extra_repr(self) -> str:
        """Return the sizes as `nn.Linear` prints them."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def __getstate__(self) -> Any:
        """Return what a copy or a pickled module is made of; refuse placed weights, which a copy would not fetch."""
        if self.before_read is not None:
            raise RuntimeError(PLACED.format("copied or pickled"))
        return super().__getstate__()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.before_read is not None:
            raise RuntimeError(PLACED.format("saved"))
        # Without the statistics, under bitsandbytes' names, the codes of a saved model would be lost.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The statistics have names below the weight's, where torch expects none.
        key = f"{prefix}weight"
        given = {name.removeprefix(f"{key}."): state_dict[name] for name in state_dict if name.startswith(f"{key}.")}
        own = self.quant_state.as_dict(packed=True)
        rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(f"{key}.")}
        found = len(missing_keys), len(error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if strict:
            missing_keys += [f"{key}.{name}" for name in own if name not in given]
            unexpected_keys += [f"{key}.{name}" for name in given if name not in own]
        error_msgs += [
            f"size mismatch for {key}.{name}: copying a param with shape {given[name].shape} from checkpoint, "
            f"the shape in current model is {own[name].shape}."
            for name in own
            if name in given and not name.startswith("quant_state.") and given[name].shape != own[name].shape
        ]
        if found != (len(missing_keys), len(error_msgs)) or not {*own} <= {*given}:
            return
        parts = {f"weight.{name}": given[name].to(self.weight.device, copy=True) for name in own}
        _, state = from_checkpoint_tensors({"weight": self.weight, **parts})
        if state.shape != self.quant_state.shape or state.blocksize != self.quant_state.blocksize:
            error_msgs.append(
                f"size mismatch for {key}: the checkpoint has {tuple(state.shape)} in blocks of {state.blocksize}, "
                f"the model {tuple(self.quant_state.shape)} in blocks of {self.quant_state.blocksize}."
            )
            return
        self.quant_state = state
        self.uncache_weight()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "NF4Linear":
        # The statistics follow the weight to its device and keep their dtype, because dequantization needs it.
        device = self.weight.device
        super()._apply(fn, recurse)
        if self.before_read is not None and self.weight.device != device:
            raise RuntimeError(PLACED.format("moved"))
        self.uncache_weight()
        self.quant_state.to(self.weight.device)
        return self
