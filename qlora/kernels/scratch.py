"""Memory that every next product's weight is written into, so that none is allocated for it."""

import threading
from collections.abc import Sequence

import torch

_local = threading.local()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor for a product that is started at once: the next call with this device may give the same memory.

    There is a buffer for each thread, stream and dtype, as long as the longest tensor asked for. Work of one stream is
    done in order, so a kernel that reads the memory is done before one that is started later writes to it; other
    streams, and threads that start work in between, have buffers of their own.

    Args:
        shape: (rows, columns) of the tensor.
        dtype: Of the tensor.
        device: Of the tensor.

    Returns:
        A contiguous tensor with any content.
    """
    buffers: dict[tuple[torch.device, int, torch.dtype], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, size = (device, stream, dtype), shape[0] * shape[1]
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffers.pop(key, None)  # freed before the longer one is made
        with torch.inference_mode(False):  # a buffer made in it could not be written outside of it
            buffer = buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)
