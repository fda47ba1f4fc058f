"""The host's free memory: keeping it free while a base is loaded, and using it again while a base computes."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# From glibc's malloc.h: the sizes from which a buffer, and freed memory at the end of the heap, go back to the system.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL, USUAL, LARGE = 1 << 16, 32 << 20, 1 << 30


@contextmanager
def returned_to_system() -> Iterator[None]:
    """Return buffers over 64 KiB to the system as soon as they are freed; afterwards, only those over 32 MiB.

    glibc starts to keep them after a few were freed. While a base is quantized, such freed buffers between the weights
    that stay, or between the parts of them that a process keeps, add up to more than the 4-bit model. With another C
    library this does nothing.
    """
    _return_from(SMALL)
    try:
        yield
    finally:
        _return_from(USUAL)


def keep_freed_memory() -> None:
    """Keep freed buffers of up to 1 GiB for the next ones, as steps on a CPU free and allocate the same sizes.

    Memory that went back to the system is cleared when it is asked for again, which took a tenth of a step.
    """
    _return_from(LARGE)


def _return_from(size: int) -> None:
    """Return freed buffers of more bytes to the system, and as much freed memory at the end of the heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, size):
            mallopt(M_MMAP_THRESHOLD, USUAL)  # the largest size of older versions of glibc
        mallopt(M_TRIM_THRESHOLD, size)


def free_host_bytes() -> int:
    """Return the free bytes of the host, or of the container that this runs in, for each process of a run here."""
    return _free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _free_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: half of the memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    values = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return available
    # Pages of files that were read are given up when memory is needed.
    own = int(used) - int(statistics.get("inactive_file", 0))
    return available if limit == "max" else max(0, min(available, int(limit) - own))


def return_freed_memory() -> None:
    """Return freed memory that this process keeps to the system, where the C library can, as glibc can."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
