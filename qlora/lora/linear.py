"""LoraLinear: a frozen linear layer with a trainable low-rank update on top."""

import math
from typing import Any

import torch
from torch import nn

from qlora.lora.function import lora_linear


class LoraLinear(nn.Module):
    """A linear layer whose weight is W + scaling · B A, with W frozen (LoRA, arXiv:2106.09685).

    B starts at zero, so a fresh layer gives exactly what its base gives.

    Args:
        base: `nn.Linear` or `NF4Linear`; its bias is kept.
        rank: Rows of A, columns of B.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an input of the low-rank branch while training.
        rslora: Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank.
        dtype: Of A and B.
        form: Of the product, see :func:`qlora.lora.function.lora_linear`.
    """

    def __init__(
        self,
        base: Any,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        form: str = "auto",
    ) -> None:
        super().__init__()
        self.base, self.form = base, form
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.base.out_features

    @torch.no_grad()
    def reset(self, init: str, generator: torch.Generator) -> None:
        """Gives A its first values, drawn on the CPU so that a seed means the same on every device.

        Args:
            init: `kaiming`, uniform within ±1 / sqrt(in) as in PEFT, or `gaussian`, with deviation 1 / rank.
            generator: A CPU generator.
        """
        values = torch.empty(self.lora_A.shape, dtype=torch.float32)
        if init == "kaiming":
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(values, std=1 / self.rank, generator=generator)
        self.lora_A.copy_(values)
        self.lora_B.zero_()

    def delta_weight(self) -> torch.Tensor:
        """scaling · B A, (out_features, in_features), fp32."""
        return (self.lora_B.detach().float() @ self.lora_A.detach().float()).mul_(self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `x`."""
        dropout = self.dropout if self.training else 0.0
        # Drawn from the CPU's generator, which recomputation restores; no device is waited for.
        seed = int(torch.randint(2**31, ())) if dropout else 0
        return lora_linear(x, self.lora_A, self.lora_B, self.base, self.scaling, self.form, dropout, seed)

    def extra_repr(self) -> str:
        """The numbers that tell one adapter from another."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout}"
