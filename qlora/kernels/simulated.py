"""The device of a run whose step is followed on the meta device, for choices that depend on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_simulated: ContextVar[torch.device | None] = ContextVar("simulated", default=None)


@contextmanager
def simulating(device: torch.device) -> Iterator[None]:
    """Have tensors on the meta device take the paths that tensors on another device would take.

    Args:
        device: Device of the run; it need not be on this machine.
    """
    token = _simulated.set(device)
    try:
        yield
    finally:
        _simulated.reset(token)


def device_of(tensor: torch.Tensor) -> torch.device:
    """Return the device of a tensor; of one on the meta device, the one that is simulated, if any is."""
    return (_simulated.get() or tensor.device) if tensor.is_meta else tensor.device
