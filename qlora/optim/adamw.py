"""AdamW over flat buffers by bitsandbytes' update kernels: 8- or 32-bit state, paged on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from qlora.optim.flat import ALIGNMENT, FlatParameters
from qlora.optim.paged import paged_part, paged_zeros, unpaged_reason
from qlora.optim.rounding import TEMPORARY_BYTES, stochastic_round

ROUNDINGS = ("stochastic", "master", "nearest")
# Names of the state's buffers: the two moments, and the scales of their blocks in 8 bits.
MOMENTS, SCALES = ("state1", "state2"), ("absmax1", "absmax2")
# Number of parameters updated at a time, a multiple of `ALIGNMENT`. It bounds the memory that a step takes, and
# bitsandbytes' kernels count in 32 bits, which the number of all parameters may exceed.
BLOCK = 1 << 22
# Temporary bytes per parameter for counting the unchanged ones.
COUNTING_BYTES = 3


class FlatAdamW:
    """AdamW (arXiv:1711.05101) on a flat buffer, by slices whose number does not depend on the number of adapters.

    The update is computed in fp32. Parameters in bf16 take it without losing small updates: rounded stochastically, or
    as a copy of an fp32 master. See :class:`qlora.optim.FlatOptimizer` for the attributes and methods.

    Args:
        flat: Parameters and their gradients; on the meta device, only the byte counts are available.
        bits: Bits per element of each moment, 8 or 32. 8-bit state has a scale for every block of 256 elements.
        paged: Keep the moments in CUDA's managed memory, which the driver moves to the host when the device is full.
            Where it has none, they are in plain memory, `is_paged` is False and `unpaged_why` says why.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        rounding: One of `ROUNDINGS`; ignored for fp32 parameters, which need none.
        seed: Seed of the stochastic rounding.
    """

    def __init__(
        self,
        flat: FlatParameters,
        *,
        bits: int = 8,
        paged: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        if bits not in (8, 32) or rounding not in ROUNDINGS:
            raise ValueError(f"bits={bits} should be 8 or 32, and rounding={rounding!r} one of {', '.join(ROUNDINGS)}")
        device = flat.data.device
        self.flat, self.betas, self.eps, self.weight_decay = flat, betas, eps, weight_decay
        self.unpaged_why = unpaged_reason(device) if paged else None
        self.is_paged = paged and self.unpaged_why is None
        self.rounding = "none" if flat.data.dtype == torch.float32 else rounding
        self.generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
        self.step_count = 0
        self._bits = bits
        self._buffers = {name: self._allocate(torch.uint8 if bits == 8 else torch.float32) for name in MOMENTS}
        self._buffers["zero_update_share"] = torch.zeros((), device=device)
        if self.rounding == "master":
            # Not paged: every step reads all of it, to round it into the parameters.
            self._buffers["master"] = flat.data.float()
        if bits == 8:
            for name in SCALES:
                self._buffers[name] = torch.zeros(flat.data.numel() // ALIGNMENT, device=device)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters in place from the flat gradient."""
        self.step_count += 1
        size, device = self.flat.data.numel(), self.flat.data.device
        with _stream_of_kernels(device):
            counts = torch.zeros(2, dtype=torch.long, device=device)
            for start in range(0, size, BLOCK):
                counts += self._step_block(slice(start, min(start + BLOCK, size)), learning_rate)
            self.zero_update_share.copy_(counts[0] / counts[1].clamp(min=1))

    def _step_block(self, block: slice, learning_rate: float) -> torch.Tensor:
        """Update some parameters.

        Returns:
            (2,): the number of elements with a gradient that kept their value, and the number with a gradient.
        """
        data, grad = self.flat.data[block], self.flat.grad[block]
        # A copy: otherwise fp32 parameters would be updated in place, before unchanged ones are counted.
        is_master = self.rounding == "master"
        weights = self._buffers["master"][block] if is_master else data.to(torch.float32, copy=True)
        for group in self.flat.groups:
            span = slice(max(group.span.start, block.start), min(group.span.stop, block.stop))
            if span.start < span.stop:
                own = weights[span.start - block.start : span.stop - block.start]
                self._update(own, span, learning_rate * group.rate)
        new = stochastic_round(weights, self.generator) if self.rounding == "stochastic" else weights.to(data.dtype)
        with_grad = grad != 0
        num_kept = torch.count_nonzero(with_grad & (new == data))
        data.copy_(new)
        return torch.stack([num_kept, torch.count_nonzero(with_grad)])

    @property
    def zero_update_share(self) -> torch.Tensor:
        """See :class:`qlora.optim.FlatOptimizer`."""
        return self._buffers["zero_update_share"]

    @property
    def state_bytes(self) -> int:
        """See :class:`qlora.optim.FlatOptimizer`."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def update_bytes(self) -> int:
        """See :class:`qlora.optim.FlatOptimizer`."""
        data = self.flat.data
        temporary = {"none": 0, "stochastic": TEMPORARY_BYTES}.get(self.rounding, data.itemsize)
        copied = 0 if self.rounding == "master" else torch.float32.itemsize
        counting = 0 if self.rounding == "stochastic" else COUNTING_BYTES  # after rounding, whose memory is free again
        return min(data.numel(), BLOCK) * (copied + temporary + counting)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See :class:`qlora.optim.FlatOptimizer`: moments, their scales, master, step count and rounding state."""
        if self.is_paged:  # The host reads managed memory without waiting for the kernels that write it.
            torch.cuda.synchronize(self.flat.data.device)
        state = dict(self._buffers)
        state["generator"] = self.generator.get_state()
        state["step"] = torch.tensor(self.step_count)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See :class:`qlora.optim.FlatOptimizer`; copies into the existing buffers, so paged ones stay paged."""
        wanted = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if wanted != found:
            raise ValueError(f"optimizer state has {found}, this run needs {wanted}")
        for name, buffer in self._buffers.items():
            buffer.copy_(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.step_count = int(state["step"])

    def _update(self, weights: torch.Tensor, span: slice, learning_rate: float) -> None:
        """Update fp32 values of some parameters of a group, and their state."""
        grad, (beta1, beta2) = self.flat.grad[span], self.betas
        moments: dict[str, Any] = {name: paged_part(self._buffers[name], span) for name in MOMENTS}
        common: dict[str, Any] = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": self.eps,
            "step": self.step_count,
            "lr": learning_rate,
            "weight_decay": self.weight_decay,
        }
        if self._bits == 8:
            blocks = slice(span.start // ALIGNMENT, span.stop // ALIGNMENT)
            scales: dict[str, Any] = {name: paged_part(self._buffers[name], blocks) for name in SCALES}
            signed, unsigned = self._quant_maps
            _kernels().optimizer_update_8bit_blockwise(
                "adam", grad, weights, **moments, **scales, **common, beta3=0.0, alpha=0.0,
                qmap1=signed, qmap2=unsigned,
            )  # fmt: skip
        else:
            _kernels().optimizer_update_32bit("adam", grad, weights, **moments, **common)

    @cached_property
    def _quant_maps(self) -> list[torch.Tensor]:
        """Values of the 8-bit codes of the two moments."""
        return [_kernels().create_dynamic_map(signed=signed).to(self.flat.data.device) for signed in (True, False)]

    def _allocate(self, dtype: torch.dtype) -> torch.Tensor:
        size, device = self.flat.data.numel(), self.flat.data.device
        if not self.is_paged:
            return torch.zeros(size, dtype=dtype, device=device)
        return paged_zeros(size, dtype, device)


@contextmanager
def _stream_of_kernels(device: torch.device) -> Iterator[None]:
    """Compute on a GPU's default stream, in order with the current one.

    It is the only stream that bitsandbytes' optimizer kernels use.

    Args:
        device: Device of the parameters; only a GPU has streams.
    """
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    try:
        with torch.cuda.stream(default):
            yield
    finally:
        current.wait_stream(default)


def _kernels() -> Any:
    """Return bitsandbytes' kernels, imported at first use: they import torch's compiler, which takes 1.5 seconds."""
    import bitsandbytes.functional

    return bitsandbytes.functional
