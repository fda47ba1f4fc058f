"""Buffers that successive products share for their dequantized weights, so that none is allocated."""

import math
import threading
from collections.abc import Sequence

import torch

_local = threading.local()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor for a product that starts at once: the next call for this device may return the same memory.

    Each thread, stream and dtype has a buffer, as long as its longest tensor so far. A stream runs its kernels in
    order, so a kernel that reads the memory finishes before a later one writes to it; other streams and threads have
    buffers of their own.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        device: Device of the tensor.

    Returns:
        A contiguous, uninitialized tensor.
    """
    buffers = _buffers()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, size = (device, stream, dtype), math.prod(shape)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffers.pop(key, None)  # freed before the longer one is allocated
        with torch.inference_mode(False):  # a buffer allocated in it could not be written to outside of it
            buffer = buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(*shape)


def free_scratch(device: torch.device) -> None:
    """Free this thread's buffers for a device, which the next product allocates again."""
    buffers = _buffers()
    for key in [key for key in buffers if key[0] == device]:
        del buffers[key]


def _buffers() -> dict[tuple[torch.device, int, torch.dtype], torch.Tensor]:
    return _local.__dict__.setdefault("buffers", {})
