"""Keeping host memory small while a base is loaded."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
SMALL, LARGE = 1 << 20, 32 << 20


@contextmanager
def returned_to_system() -> Iterator[None]:
    """Return buffers over 1 MiB to the system as soon as they are freed.

    glibc starts to keep them after a few were freed. While a base is quantized, such freed buffers between the weights
    that stay add up to more than the 4-bit model. On exit glibc keeps them again, because training frees and allocates
    the same sizes in each step. With another C library this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGE)
