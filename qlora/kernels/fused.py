"""Whether norms, gated products and rotary embeddings may be computed by kernels of Triton."""

import torch

from qlora.kernels.dequantize import HAS_TRITON


def unfused_reason(device: torch.device) -> str | None:
    """Return why they are computed in plain torch on a device, or None if kernels may be tried."""
    if device.type != "cuda":
        return "the fused kernels are for CUDA"
    return None if HAS_TRITON else "Triton is not installed"
