"""Whether kernels of Triton may be used for an operation, and why one is not."""

import torch

from qlora.kernels.dequantize import HAS_TRITON
from qlora.out_of_memory import is_out_of_memory

# Characters of a compiler's message that a reason repeats.
MOST_CHARACTERS = 200


def unfused_reason(device: torch.device) -> str | None:
    """Return why norms, gated products and rotary embeddings are computed in plain torch on a device.

    Returns:
        None if kernels may be tried.
    """
    if device.type != "cuda":
        return "the fused kernels are for CUDA"
    return None if HAS_TRITON else "Triton is not installed"


def describe_failure(error: Exception) -> str:
    """Return the error of a kernel that was tried, on one line; raise it again if memory ran out.

    Triton may lack a C compiler, Python's headers, a folder to write to, ….
    """
    if is_out_of_memory(error):
        raise error
    message = " ".join(str(error).split())[:MOST_CHARACTERS]
    return f"{type(error).__name__}: {message}"
