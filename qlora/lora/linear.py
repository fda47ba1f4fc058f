"""LoraLinear: a frozen linear layer with a trainable low-rank update on top."""

import math
from typing import Any

import torch
from torch import nn

from qlora.kernels import LowRank, fold
from qlora.lora.function import lora_linear
from qlora.lora.spec import AdapterSpec


class LoraLinear(nn.Module):
    """A linear layer whose weight is W + scaling · B A, with W frozen (LoRA, arXiv:2106.09685).

    B starts at zero, so a fresh layer gives exactly what its base gives.

    Args:
        base: `nn.Linear` or `NF4Linear`; its bias is kept.
        spec: Rank, scaling, initial values and form of the update.

    Attributes:
        is_off: Whether the layer computes what its base does, see :func:`qlora.lora.adapters_off`.
    """

    def __init__(self, base: Any, spec: AdapterSpec) -> None:
        super().__init__()
        self.base, self.spec, self.is_off = base, spec, False
        shape_A, shape_B = spec.shapes(base.out_features, base.in_features)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, dtype=spec.dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=spec.dtype, device=base.weight.device))

    @property
    def in_features(self) -> int:
        """Number of columns of the weight."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Number of rows of the weight."""
        return self.base.out_features

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Initialize A and B; A is drawn on the CPU, so that a seed gives the same values on every device.

        Args:
            generator: A CPU generator.
        """
        values = torch.empty(self.lora_A.shape, dtype=torch.float32)
        if self.spec.init == "kaiming":
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(values, std=1 / self.spec.rank, generator=generator)
        self.lora_A.copy_(values)
        self.lora_B.zero_()

    @property
    def deltas(self) -> tuple[LowRank, ...]:
        """The terms that the adapter adds to the weight."""
        return (LowRank(self.lora_A, self.lora_B, self.spec.scaling),)

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return the sum of the adapter's terms, scaling · B A, (out_features, in_features), fp32."""
        zeros = self.lora_A.new_zeros(self.out_features, self.in_features, dtype=torch.float32)
        return fold(zeros, [delta.to(torch.float32) for delta in self.deltas], out=zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of `x`."""
        if self.is_off:
            return self.base(x)
        spec = self.spec
        dropout = spec.dropout if self.training else 0.0
        # Drawn from the CPU's generator, which recomputation restores, so that the host does not wait for the device.
        seed = int(torch.randint(2**31, ())) if dropout else 0
        return lora_linear(x, self.base, self.deltas, form=spec.form, dropout=dropout, seed=seed)

    def extra_repr(self) -> str:
        """Return rank, scaling and dropout."""
        return f"rank={self.spec.rank}, scaling={self.spec.scaling:g}, dropout={self.spec.dropout}"
