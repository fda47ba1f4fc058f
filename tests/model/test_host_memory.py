"""Freed memory goes back to the system while a base is loaded and on request, and stays with the process otherwise."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.model.host_memory import return_freed_memory

# In a process of its own, because these settings can't be read, and are kept until it ends.
FAULTS = """
import ctypes, resource
from qlora.model.host_memory import keep_freed_memory, returned_to_system

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    address = libc.malloc(24 << 20)
    ctypes.memset(address, 1, 24 << 20)
    libc.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with returned_to_system():
    within = [pages(), pages()]
keep_freed_memory()
print(*within, pages(), pages())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator has no mallopt to set")
def test_memory_is_returned_while_a_base_is_loaded_and_kept_while_it_computes():
    output = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    first, second, third, fourth = map(int, output.split())
    assert min(first, second, third) > 5
    assert fourth < 5


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator has no malloc_trim")
def test_freed_memory_between_what_stays_is_returned():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    size = 64 << 10
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    *addresses, end_of_heap = (libc.malloc(size) for _ in range(1000))
    for address in addresses:
        ctypes.memset(address, 1, size)
        libc.free(address)
    kept = resident()
    return_freed_memory()
    returned = kept - resident()
    libc.free(end_of_heap)
    assert returned * os.sysconf("SC_PAGE_SIZE") > 900 * size
