"""Buffers in CUDA's managed memory, which the driver moves to the host while the device is full.

They are bitsandbytes', whose tensors are torch tensors on the host over memory that the device reads and writes too.
The host must touch them only while no kernel of the device uses them.
"""

import ctypes
import weakref

import torch

# The driver's number of the attribute that says whether host and device may use managed memory at the same time.
CONCURRENT_MANAGED_ACCESS = 89


def unpaged_reason(device: torch.device) -> str | None:
    """Return why buffers of a device can't be paged, or None if they can."""
    if device.type != "cuda":
        return "paging needs CUDA's managed memory"
    found = ctypes.c_int()
    try:
        torch.cuda.init()  # the driver answers only after it was started
        driver = _driver()
        failed = driver.cuDeviceGetAttribute(ctypes.byref(found), CONCURRENT_MANAGED_ACCESS, _ordinal(device))
    except OSError as error:
        return f"CUDA's driver can't be asked whether it pages: {error}"
    if failed:
        return f"CUDA's driver can't be asked whether it pages: cuDeviceGetAttribute returned status {failed}"
    if not found.value:
        return "the driver lacks concurrent access to managed memory, as under WSL"
    return None


def paged_zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a buffer of zeros in managed memory, which is freed with its last tensor.

    Args:
        size: Number of elements.
        dtype: uint8 or fp32, which bitsandbytes can fill.
        device: Device that uses it.

    Returns:
        (size,), on the host, with the attributes by which bitsandbytes recognizes managed memory.
    """
    import bitsandbytes.functional

    index = _ordinal(device)
    with torch.cuda.device(index):
        buffer = bitsandbytes.functional.get_paged(size, dtype=dtype, device=torch.device(device.type, index))
        bitsandbytes.functional.fill(buffer, 0)  # on the device, which it waits for: the host does not touch the pages
    # bitsandbytes never frees it.
    weakref.finalize(buffer.untyped_storage(), _free, buffer.data_ptr(), index).atexit = False
    return buffer


def paged_part(buffer: torch.Tensor, span: slice) -> torch.Tensor:
    """Return some elements of a buffer, with the attributes by which bitsandbytes recognizes managed memory."""
    part = buffer[span]
    for mark in ("is_paged", "page_deviceid"):
        if hasattr(buffer, mark):
            setattr(part, mark, getattr(buffer, mark))
    return part


def _free(pointer: int, index: int) -> None:
    with torch.cuda.device(index):
        torch.cuda.synchronize()  # a kernel may still use it
        _driver().cuMemFree_v2(ctypes.c_uint64(pointer))


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _driver() -> ctypes.CDLL:
    """Return CUDA's driver, which every machine with a GPU has, and which torch has started."""
    return ctypes.CDLL("libcuda.so.1")
