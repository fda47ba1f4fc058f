"""The optimizers that a run can use, by name, and their common interface."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from qlora.optim.adamw import FlatAdamW
from qlora.optim.flat import FlatParameters


class FlatOptimizer(Protocol):
    """An optimizer over the flat buffer of trained parameters.

    Attributes:
        flat: Parameters and their gradients.
        step_count: Number of updates made.
        is_paged: Whether the state is in CUDA's managed memory.
        unpaged_why: Reason that a paged optimizer's state is not paged; None otherwise.
        rounding: How new values become the parameters' dtype; `none` for fp32 parameters.
    """

    flat: FlatParameters
    step_count: int
    is_paged: bool
    unpaged_why: str | None
    rounding: str

    @property
    def zero_update_share(self) -> torch.Tensor:
        """Share of the trained elements with a gradient whose stored value the last step left unchanged.

        A scalar tensor, fp32, on the parameters' device.
        """

    @property
    def state_bytes(self) -> int:
        """Number of bytes of the state."""

    @property
    def update_bytes(self) -> int:
        """Number of temporary bytes in :meth:`step`, besides parameters, gradients and state."""

    def step(self, learning_rate: float) -> None:
        """Update the parameters in place from the flat gradient; each group at its factor times the learning rate."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything that a continued run needs: the live buffers, not copies."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict` by copying.

        Raises:
            ValueError: The state has other buffers or sizes: it is from another optimizer or other adapters.
        """


# Optimizers by their names in `train.optimizer`.
OPTIMIZERS: dict[str, Callable[..., FlatOptimizer]] = {
    "paged_adamw_8bit": partial(FlatAdamW, bits=8, paged=True),
    "paged_adamw_32bit": partial(FlatAdamW, bits=32, paged=True),
    "adamw_8bit": partial(FlatAdamW, bits=8, paged=False),
    "adamw_32bit": partial(FlatAdamW, bits=32, paged=False),
}


def make_optimizer(name: str, flat: FlatParameters, **settings: Any) -> FlatOptimizer:
    """Make an optimizer by its name.

    Args:
        name: One of `OPTIMIZERS`.
        flat: Parameters and their gradients.
        settings: Keyword arguments of the optimizer.

    Raises:
        ValueError: There is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} should be one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](flat, **settings)
