"""How torch's allocator takes memory from a GPU."""

import os
import sys

# torch reads the first of these that is set, when memory of a GPU is first asked for.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def use_expandable_segments() -> None:
    """Let the allocator's memory grow in place, so that batches of many lengths leave no gaps that are too small.

    It has to be called before anything is on a GPU. Settings that the user made in the environment are kept; torch
    supports this on Linux only.
    """
    if sys.platform == "linux" and allocator_settings() is None:
        os.environ[VARIABLES[0]] = EXPANDABLE


def allocator_settings() -> str | None:
    """Return the allocator's settings in the environment, or None if there are none."""
    return next((os.environ[name] for name in VARIABLES if name in os.environ), None)
