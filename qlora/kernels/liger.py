"""liger-kernel's RMSNorm and gated products, an optional package of Triton kernels, as functions to be rebuilt."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from qlora.kernels.gated import GatedProduct
from qlora.kernels.norm import RMSNorm


def liger_version() -> str | None:
    """The version that is installed, if one is."""
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


def why_not_liger(device: torch.device) -> str | None:
    """Why none of its kernels can be used on a device; None if they may."""
    if device.type != "cuda":
        return "liger-kernel is for CUDA"
    return "liger-kernel is not installed" if liger_version() is None else None


def liger_twin(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """What computes the same on liger's kernels, differentiable; None where liger has no kernel for it.

    Args:
        function: An `RMSNorm`, a `GatedProduct`, or anything else, for which there is none.

    Raises:
        ImportError: liger-kernel is not installed, or lacks what is used of it here.
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
        # The last argument keeps it from writing over the gradient it is given, which the residual has a share in.
        return LigerRMSNormFunction.apply(x, norm.weight, norm.eps, norm.offset, casting_mode, False)

    return liger_norm


def _liger_product(product: GatedProduct) -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = LigerSiLUMulFunction if product.activation == "silu" else LigerGELUMulFunction

    def liger_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # Its backward writes over what it has kept, and these are kept by others too.
            gate, up = gate.clone(), up.clone()
        return function.apply(gate, up)

    return liger_product
