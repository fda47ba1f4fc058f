"""RMSNorm and gated products on liger-kernel, an optional package of Triton kernels."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from qlora.kernels.gated import GatedProduct
from qlora.kernels.norm import RMSNorm


def liger_version() -> str | None:
    """Return the installed version, or None."""
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


def liger_unavailable_reason(device: torch.device) -> str | None:
    """Return why liger-kernel can't be used on a device, or None if it can."""
    if device.type != "cuda":
        return "liger-kernel is for CUDA"
    return "liger-kernel is not installed" if liger_version() is None else None


def liger_twin(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """Return a differentiable function that does the same on liger's kernels, or None if it has no such kernel.

    Args:
        function: An `RMSNorm` or a `GatedProduct`; nothing else has a kernel.

    Raises:
        ImportError: liger-kernel is not installed, or lacks a function used here.
    """
    if isinstance(function, RMSNorm):
        return _liger_norm(function)
    if isinstance(function, GatedProduct) and function.activation in ("silu", "gelu_tanh"):
        return _liger_product(function)
    return None


def _liger_norm(norm: RMSNorm) -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    casting_mode = "llama" if norm.rounds_first else "gemma"

    def liger_norm(x: torch.Tensor) -> torch.Tensor:
        # The last argument keeps it from overwriting the incoming gradient, which the residual branch also uses.
        return LigerRMSNormFunction.apply(x, norm.weight, norm.eps, norm.offset, casting_mode, False)

    return liger_norm


def _liger_product(product: GatedProduct) -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = LigerSiLUMulFunction if product.activation == "silu" else LigerGELUMulFunction

    def liger_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # Its backward overwrites the tensors it saved, which others have saved too.
            gate, up = gate.clone(), up.clone()
        return function.apply(gate, up)

    return liger_product
