"""NF4Experts: a frozen stack of expert weights in 4 bits, of which single experts are dequantized."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora.kernels import ExpertGroup, LowRank, fold_group, scratch, weights_of_group
from qlora.nf4.linear import PLACED
from qlora.nf4.mxfp4 import quantize_mxfp4
from qlora.nf4.quantize import (
    BLOCK_SIZE,
    MXFP4,
    NESTED_BLOCK_SIZE,
    NF4,
    dequantize,
    is_close,
    kind_of_kernel,
    quantize,
    random_delta,
    same_bits,
    verify_kernel,
)

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class NF4Experts(nn.Module):
    """The weights of all experts of a layer for one projection, in NF4, each with statistics of its own.

    Shared statistics would cost accuracy where experts differ in scale: with scales of 1 : 100 the relative error of
    the smallest expert rises from 0.09 to 0.13.

    Weights that were published in MXFP4 keep its codes, see :mod:`qlora.nf4.mxfp4`. They are held as (experts, out,
    in) then, because its blocks are along `in`.

    Args:
        packed: Codes, (experts, ceil(rows · columns / 2)) uint8.
        statistics: What dequantizes them, as :meth:`from_weight` makes it: tensors whose first dimension is the
            experts'.
        tables: Tensors that all experts share: the values of the codes, and those of the codes of `absmax`.
        shape: (experts, rows, columns) of the weights, in the orientation of the model unless they are flipped.
        block_size: Number of weights that share one absmax.
        dtype: Dtype that they were quantized from.
        quant_type: What the codes are: `nf4` or `mxfp4`.
        is_flipped: Whether the weights are (out, in) where the model has (in, out).

    Attributes:
        before_read: Called before the codes are read, where they are not always in memory; None where they are.
    """

    before_read: Callable[[], None] | None = None

    def __init__(
        self,
        packed: torch.Tensor,
        statistics: dict[str, torch.Tensor],
        tables: dict[str, torch.Tensor],
        shape: tuple[int, int, int],
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.bfloat16,
        quant_type: str = NF4,
        is_flipped: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed, requires_grad=False)
        # No buffers: a cast of the model would cast them too, and dequantization needs them as they are.
        self._statistics, self._tables = statistics, tables
        self.shape, self.block_size, self.quantized_from = shape, block_size, dtype
        self.quant_type, self.is_flipped = quant_type, is_flipped
        self._cached: torch.Tensor | None = None

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, double_quant: bool = True, quant_type: str = NF4, is_transposed: bool = False
    ) -> "NF4Experts":
        """Quantize a stack of weights, one expert after the other.

        Args:
            weight: (experts, rows, columns), fp32, bf16 or fp16.
            double_quant: Quantize the blocks' absmax to 8 bits too; MXFP4's always are in 8 bits.
            quant_type: `nf4`; or `mxfp4` for weights that were decoded from it, whose values stay the same.
            is_transposed: Whether an expert's weight is (in, out) instead of (out, in).

        Raises:
            ValueError: The type is unknown, or some values are none that MXFP4 has.
        """
        if quant_type not in (NF4, MXFP4):
            raise ValueError(f"quant_type={quant_type!r} should be {NF4} or {MXFP4}")
        is_flipped = quant_type == MXFP4 and is_transposed
        weight = weight.mT if is_flipped else weight
        experts, rows, columns = weight.shape
        packed, statistics, tables = torch.empty(0), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        state: Any = None
        for expert in range(experts):
            own_weight = weight[expert]
            codes, state = quantize_mxfp4(own_weight) if quant_type == MXFP4 else quantize(own_weight, double_quant)
            own = {"absmax": state.absmax}
            if state.nested:
                own |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
            if not expert:
                packed = codes.new_empty(experts, codes.numel())
                statistics = {name: each.new_empty(experts, *each.shape) for name, each in own.items()}
            packed[expert] = codes.flatten()
            for name, each in own.items():
                statistics[name][expert] = each
        tables = {"code": state.code} | ({"nested_code": state.state2.code} if state.nested else {})
        shape = experts, rows, columns
        return cls(packed, statistics, tables, shape, state.blocksize, weight.dtype, quant_type, is_flipped)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the codes, where products are computed."""
        return self.weight.device

    @property
    def numel(self) -> int:
        """Number of weights of all experts."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the codes and their statistics."""
        return sum(tensor.nbytes for tensor in (self.weight, *self.statistics))

    @property
    def statistics(self) -> list[torch.Tensor]:
        """The tensors that dequantize the codes; the first dimension of each is the experts'."""
        return [*self._statistics.values()]

    @property
    def packed(self) -> list[torch.Tensor]:
        """The codes and their statistics, which :meth:`use_packed` replaces."""
        return [self.weight.data, *self.statistics]

    def use_packed(self, tensors: Sequence[torch.Tensor]) -> None:
        """Use other tensors in place of :attr:`packed`, with the same shapes and dtypes."""
        self.weight.data, *others = tensors
        self._statistics = dict(zip(self._statistics, others, strict=True))

    def ensure_present(self) -> None:
        """Have the codes and their statistics in memory until other weights are read."""
        if self.before_read is not None:
            self.before_read()

    def quant_state(self, expert: int) -> "QuantState":
        """Return the statistics of an expert, as :func:`qlora.nf4.quantize` gives them."""
        from bitsandbytes.functional import QuantState

        own = {name: tensor[expert] for name, tensor in self._statistics.items()}
        nested: dict[str, Any] = {}
        if "offset" in own:
            state2 = QuantState(
                own["nested_absmax"], blocksize=NESTED_BLOCK_SIZE, code=self._tables["nested_code"], dtype=torch.float32
            )
            nested = {"offset": own["offset"], "state2": state2}
        shape = torch.Size(self.shape[1:])
        return QuantState(
            own["absmax"], shape, self._tables["code"], blocksize=self.block_size, quant_type=self.quant_type,
            dtype=self.quantized_from, **nested,
        )  # fmt: skip

    def dequantize(self, expert: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of an expert, (rows, columns), in `dtype`."""
        self.ensure_present()
        return dequantize(self.weight[expert], self.quant_state(expert), dtype, out)

    def weights_for_product(
        self, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None = None
    ) -> torch.Tensor:
        """Return the weights of a group of experts for a product that starts at once; the next call may overwrite them.

        Args:
            group: The experts.
            dtype: Dtype of the result.
            update: Terms of all experts of the layer, of which each expert's is added to its weight: in any dtype and
                in the orientation of the weights.

        Returns:
            (experts of the group, rows, columns).
        """
        experts, cached = group.experts, self._cached
        # On a GPU the fused kernel reads fewer bytes of codes than of a cached weight.
        if cached is not None and cached.dtype == dtype and not (self.weight.is_cuda and update is not None):
            return weights_of_group(cached, group, dtype, update)
        if len(experts) == 1 and not self.weight.is_cuda:  # where bitsandbytes returns a new tensor
            weight = self.dequantize(experts[0], dtype)[None]
            return fold_group(weight, update, group, out=weight)
        self.ensure_present()
        out = scratch((len(experts), *self.shape[1:]), dtype, self.weight.device)
        kind = kind_of_kernel(self.weight, self.shape[1:], self.block_size, update)
        if verify_kernel(
            (self.weight.device, dtype, "experts", "offset" in self._statistics, *kind),
            f"experts of {self.extra_repr()}",
            lambda: self._agrees(group.first(2), dtype, update),
        ):
            return self._dequantize_at_once(group, dtype, update, out)
        return self._dequantize_one_by_one(group, dtype, update, out)

    def cache_weight(self, dtype: torch.dtype) -> None:
        """Keep the dequantized weights for products in `dtype`: 2 bytes per parameter in 16 bits."""
        self._cached = torch.empty(self.shape, dtype=dtype, device=self.weight.device)
        for expert, own in enumerate(self._cached):
            self.dequantize(expert, dtype, own)

    def uncache_weight(self) -> None:
        """Undo :meth:`cache_weight`."""
        self._cached = None

    @property
    def is_cached(self) -> bool:
        """Whether the dequantized weights are cached."""
        return self._cached is not None

    def _dequantize_one_by_one(
        self, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None, out: torch.Tensor
    ) -> torch.Tensor:
        for own, expert in zip(out, group.experts, strict=True):
            self.dequantize(expert, dtype, own)
        return fold_group(out, update, group, out=out)

    def _dequantize_at_once(
        self, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None, out: torch.Tensor
    ) -> torch.Tensor:
        from qlora.kernels.dequantize_triton import dequantize_4bit_triton

        own, options = self._statistics, dict[str, Any]()
        if "offset" in own:
            options = {
                "nested_code": self._tables["nested_code"], "nested_absmax": own["nested_absmax"],
                "nested_offset": own["offset"], "nested_block_size": NESTED_BLOCK_SIZE,
            }  # fmt: skip
        if update is not None:
            update = update.to(dtype)
            options |= {"lora_A": update.A, "lora_B": update.B, "scaling": update.scaling}
        return dequantize_4bit_triton(
            self.weight, self._tables["code"], own["absmax"], self.shape[1:], dtype, self.block_size,
            index=group.index, out=out, **options,
        )  # fmt: skip

    def _agrees(self, group: ExpertGroup, dtype: torch.dtype, update: LowRank | None) -> bool:
        """Return whether experts that are dequantized at once are those dequantized one by one."""
        trial = None if update is None else random_delta(update)  # B starts at zero and would hide a difference
        outs = torch.empty(2, len(group.experts), *self.shape[1:], dtype=dtype, device=self.weight.device)
        found = self._dequantize_at_once(group, dtype, trial, outs[0])
        wanted = self._dequantize_one_by_one(group, dtype, trial, outs[1])
        return same_bits(found, wanted) if trial is None else is_close(found, wanted)

    def forward(self, *_: Any) -> torch.Tensor:
        """Refuse: experts are called through their layer, which knows the experts of each token."""
        raise TypeError("NF4Experts holds weights; call the layer of experts that it is part of.")

    def extra_repr(self) -> str:
        """Return the sizes, and what the codes are if they are not NF4's."""
        return " × ".join(map(str, self.shape)) + ("" if self.quant_type == NF4 else f", {self.quant_type}")

    def __getstate__(self) -> Any:
        """Return what a copy or a pickled module is made of; refuse placed weights, which a copy would not fetch."""
        if self.before_read is not None:
            raise RuntimeError(PLACED.format("copied or pickled"))
        return super().__getstate__()

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Return the statistics, without which the codes of a saved model would be lost; refuse placed weights."""
        if self.before_read is not None:
            raise RuntimeError(PLACED.format("saved"))
        return dict(self._statistics)

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the statistics of a saved model; raises ValueError if they are of another weight."""
        own = {name: tensor.shape for name, tensor in self._statistics.items()}
        if {name: tensor.shape for name, tensor in state.items()} != own:
            raise ValueError(f"the statistics are of other weights than {self.extra_repr()}")
        self._statistics = {name: tensor.to(self.weight.device, copy=True) for name, tensor in state.items()}
        self.uncache_weight()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "NF4Experts":
        # The statistics follow the codes to their device and keep their dtype, because dequantization needs it.
        device = self.weight.device
        super()._apply(fn, recurse)
        if self.before_read is not None and self.weight.device != device:
            raise RuntimeError(PLACED.format("moved"))
        self.uncache_weight()
        device = self.weight.device
        self._statistics = {name: tensor.to(device) for name, tensor in self._statistics.items()}
        self._tables = {name: tensor.to(device) for name, tensor in self._tables.items()}
        return self
