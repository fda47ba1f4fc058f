"""AdamW over flat buffers by bitsandbytes' update kernels: 8- or 32-bit state, paged on CUDA."""

from typing import Any

import torch

from qlora.optim.flat import ALIGNMENT, FlatParameters
from qlora.optim.rounding import stochastic_round

# Parameters rounded at a time, which takes 15 bytes of each for a moment.
BLOCK = 1 << 22
# name -> (bits of state, paged)
OPTIMIZERS = {
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
    "adamw_8bit": (8, False),
    "adamw_32bit": (32, False),
}


class FlatAdamW:
    """AdamW (arXiv:1711.05101) on a flat buffer: one kernel a step, whatever the number of adapters.

    The update is computed in fp32. Parameters in bf16 then take it without losing small updates: rounded
    stochastically, or as a copy of an fp32 master.

    Args:
        flat: The parameters and their gradients.
        name: One of `OPTIMIZERS`. Paged state lives in CUDA's managed memory, which the driver moves to the
            host when the device is full; elsewhere it is plain memory, and `is_paged` says so.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled; times the learning rate.
        rounding: `stochastic`, `master` or `nearest`. Only for parameters below fp32.
        seed: Of the stochastic rounding.

    Attributes:
        zero_update_share: Of the trained elements with a gradient, those that kept their stored value in the last
            step: a scalar tensor, fp32.
    """

    def __init__(
        self,
        flat: FlatParameters,
        name: str = "paged_adamw_8bit",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        import bitsandbytes.functional as kernels  # here: it brings torch's compiler with it, a second and a half

        assert rounding in ("stochastic", "master", "nearest"), rounding
        self._kernels = kernels
        bits, paged = OPTIMIZERS[name]
        device = flat.data.device
        self.flat, self.betas, self.eps, self.weight_decay = flat, betas, eps, weight_decay
        self.is_paged = paged and device.type == "cuda"
        self.rounding = "none" if flat.data.dtype == torch.float32 else rounding
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.step_count = 0
        self._buffers = {name: self._state_buffer(bits) for name in ("state1", "state2")}
        self._buffers["zero_update_share"] = torch.zeros((), device=device)
        if self.rounding == "master":
            # Not paged: every step reads all of it, to round it into the parameters.
            self._buffers["master"] = flat.data.float()
        self._quant_maps: list[torch.Tensor] = []
        if bits == 8:
            self._quant_maps = [kernels.create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
            for index in ("1", "2"):
                blocks = flat.data.numel() // ALIGNMENT
                self._buffers[f"absmax{index}"] = torch.zeros(blocks, dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates the parameters in place from the flat gradient."""
        self.step_count += 1
        # A copy: where nothing is rounded, the update would else be made in the parameters themselves.
        is_master = self.rounding == "master"
        weights = self._buffers["master"] if is_master else self.flat.data.to(torch.float32, copy=True)
        self._update(weights, learning_rate)
        counts = torch.zeros(2, dtype=torch.long, device=weights.device)
        for start in range(0, weights.numel(), BLOCK):
            counts += self._take_over(weights, slice(start, start + BLOCK))
        self.zero_update_share.copy_(counts[0] / counts[1].clamp(min=1))

    def _take_over(self, weights: torch.Tensor, block: slice) -> torch.Tensor:
        """Rounds new values into some of the parameters; how many with a gradient stayed, and how many have one."""
        data, values = self.flat.data[block], weights[block]
        new = stochastic_round(values, self.generator) if self.rounding == "stochastic" else values.to(data.dtype)
        with_grad = self.flat.grad[block] != 0
        num_kept = torch.count_nonzero(with_grad & (new == data))
        data.copy_(new)
        return torch.stack([num_kept, torch.count_nonzero(with_grad)])

    @property
    def zero_update_share(self) -> torch.Tensor:
        """See the class."""
        return self._buffers["zero_update_share"]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that a continued run needs: moments, master, step count and rounding state; the live buffers."""
        if self.is_paged:  # The host reads managed memory without waiting for the kernels that write it.
            torch.cuda.synchronize(self.flat.data.device)
        state = dict(self._buffers)
        state["generator"] = self.generator.get_state()
        state["step"] = torch.tensor(self.step_count)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores :meth:`state_dict` by copying into the buffers at hand, which so remain paged.

        Raises:
            ValueError: The state has other buffers or sizes: it is from another optimizer or other adapters.
        """
        wanted = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if wanted != found:
            raise ValueError(f"optimizer state has {found}, this run needs {wanted}")
        for name, buffer in self._buffers.items():
            buffer.copy_(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.step_count = int(state["step"])

    def _update(self, weights: torch.Tensor, learning_rate: float) -> None:
        state, (beta1, beta2) = self._buffers, self.betas
        moments: dict[str, Any] = {"state1": state["state1"], "state2": state["state2"]}
        common: dict[str, Any] = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": self.eps,
            "step": self.step_count,
            "lr": learning_rate,
            "weight_decay": self.weight_decay,
        }
        if self._quant_maps:
            signed, unsigned = self._quant_maps
            self._kernels.optimizer_update_8bit_blockwise(
                "adam", self.flat.grad, weights, **moments, **common, beta3=0.0, alpha=0.0,
                qmap1=signed, qmap2=unsigned, absmax1=state["absmax1"], absmax2=state["absmax2"],
            )  # fmt: skip
        else:
            self._kernels.optimizer_update_32bit("adam", self.flat.grad, weights, **moments, **common)

    def _state_buffer(self, bits: int) -> torch.Tensor:
        return self._allocate(torch.uint8 if bits == 8 else torch.float32)

    def _allocate(self, dtype: torch.dtype) -> torch.Tensor:
        size, device = self.flat.data.numel(), self.flat.data.device
        if not self.is_paged:
            return torch.zeros(size, dtype=dtype, device=device)
        buffer = self._kernels.get_paged(size, dtype=dtype, device=torch.device(device.type, device.index or 0))
        return buffer.zero_()
