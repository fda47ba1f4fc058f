"""How torch's allocator takes memory from a GPU."""

import os
import platform
import sys

# torch reads the first of these that is set, when memory of a GPU is first asked for.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
# Parts of the release of kernels on which CUDA's management of virtual memory can fail: WSL's and Jetson's.
UNRELIABLE = ("microsoft", "tegra")


def use_expandable_segments() -> None:
    """Let the allocator's memory grow in place, so that batches of many lengths leave no gaps that are too small.

    It has to be called before anything is on a GPU. Settings that the user made in the environment are kept. torch
    supports this on Linux only, and needs a driver that manages virtual memory. The driver is not asked: that would
    initialize CUDA in every process that imports qlora, after which it can't be used in a forked one. Where the kernel
    is not one of `UNRELIABLE` and the driver still can't, as with some virtual GPUs, the user sets it to False.
    """
    release = platform.release().lower()
    if sys.platform == "linux" and allocator_settings() is None and not any(name in release for name in UNRELIABLE):
        os.environ[VARIABLES[0]] = EXPANDABLE


def allocator_settings() -> str | None:
    """Return the allocator's settings in the environment, or None if there are none."""
    return next((os.environ[name] for name in VARIABLES if name in os.environ), None)
