"""LoraLinear: a frozen linear layer with a trainable update of its weight on top."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.hooks import has_hooks
from qlora.kernels import Delta, LowRank, SparseRows, fold, row_norms
from qlora.lora.function import Product, dora_linear, lora_linears
from qlora.lora.initial import orthogonal
from qlora.lora.spec import DRAWN_INITS, AdapterSpec


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter of one layer as PEFT stores it: the effective weight is c ∘ (W + scaling · B A).

    Attributes:
        A: (rank, in).
        B: (out, rank).
        scaling: Factor on the product.
        magnitude: (out,), the norms of the effective weight's rows (DoRA, arXiv:2402.09353); None without DoRA.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    @property
    def delta(self) -> LowRank:
        """The term that is added to the weight."""
        return LowRank(self.A, self.B, self.scaling)


class _Term:
    """An attribute of a layer that is a low-rank term or None, held in buffers so that it moves with the layer."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._A, self._B, self._scaling = f"{name}_A", f"{name}_B", f"{name}_scaling"

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        A = getattr(layer, self._A)
        return None if A is None else LowRank(A, getattr(layer, self._B), getattr(layer, self._scaling))

    def __set__(self, layer: Any, term: LowRank | None) -> None:
        # Contiguous, as they are read from a file: products of other layouts may round differently.
        layer.register_buffer(self._A, None if term is None else term.A.contiguous())
        layer.register_buffer(self._B, None if term is None else term.B.contiguous())
        setattr(layer, self._scaling, None if term is None else term.scaling)


class LoraLinear(nn.Module):
    """A linear layer whose weight is c ∘ (W + Σ deltas), with W frozen (LoRA, arXiv:2106.09685).

    The update is zero at first, so a fresh layer gives exactly what its base gives. It trains `lora_A` and `lora_B`,
    or `lora_rows`; with DoRA also `magnitude`, the change of the norms of the rows since the start: their values, in
    fp32, are `first_magnitude + magnitude`.

    Args:
        base: `nn.Linear` or `NF4Linear`; its bias is kept.
        spec: Kind, rank, scaling and form of the update.

    Attributes:
        frozen: A term that is not trained, an earlier adapter; or None.
        removed: The initial values, if they are subtracted again so that the update is zero at first; or None.
        first: A term that stays where the adapters are off, because the base was quantized without it; or None.
        kept: The update as it was at first, if it was not zero and is needed as a reference; or None.
        kept_magnitude: The norms that a DoRA layer with such a term started from, (out,), fp32; or None.
        null_space: Orthonormal directions of the inputs that A does not see, (in, directions), fp32; or None.
        is_off: Whether the layer computes what its base does, see :func:`qlora.lora.adapters_off`.
        is_at_start: Whether it computes what it did at first, see :func:`qlora.lora.adapters_at_start`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_rows: nn.Parameter
    magnitude: nn.Parameter
    frozen, removed, first, kept = _Term(), _Term(), _Term(), _Term()
    row_index: torch.Tensor
    first_magnitude: torch.Tensor
    kept_magnitude: torch.Tensor | None
    null_space: torch.Tensor | None

    def __init__(self, base: Any, spec: AdapterSpec) -> None:
        super().__init__()
        self.base, self.spec = base, spec
        self.is_off = self.is_at_start = False
        device = base.weight.device
        for name, shape in spec.shapes(base.out_features, base.in_features).items():
            values = torch.zeros(shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=spec.trains(name)))
        if spec.kind == "rows":
            self.register_buffer("row_index", torch.arange(spec.rank, device=device))
        if spec.kind == "dora":
            self.register_buffer("first_magnitude", torch.ones(base.out_features, device=device))
        self.register_buffer("null_space", None)
        self.register_buffer("kept_magnitude", None)
        self.frozen = self.removed = self.first = self.kept = None

    @property
    def in_features(self) -> int:
        """Number of columns of the weight."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Number of rows of the weight."""
        return self.base.out_features

    @torch.no_grad()
    def reset(self, generator: torch.Generator, dtype: torch.dtype | None = None) -> None:
        """Set the initial values, which are drawn on the CPU, so that a seed gives the same on every device.

        Args:
            generator: A CPU generator.
            dtype: Compute dtype; default: that of the base's weight.
        """
        for name in self.spec.shapes(self.out_features, self.in_features):
            getattr(self, name).zero_()
        if self.spec.kind == "rows":
            norms = row_norms(self._base_weight(dtype))
            self.row_index.copy_(norms.topk(self.spec.rank).indices.sort().values)
        else:
            init = self.spec.init if self.spec.init in DRAWN_INITS else "kaiming"  # the others are set afterwards
            self.lora_A.copy_(draw(init, self.spec.rank, self.in_features, generator))
        self.start_magnitude(dtype)

    @torch.no_grad()
    def start_magnitude(self, dtype: torch.dtype | None = None) -> None:
        """With DoRA, let the magnitude start at the norms of the current weight's rows, so that it changes no output.

        Args:
            dtype: Compute dtype; default: that of the base's weight.
        """
        if self.spec.kind == "dora":
            weight = self._base_weight(dtype)
            self.first_magnitude.copy_(row_norms(fold(weight, self._cast(weight.dtype))))
            self.magnitude.zero_()

    @property
    def first_trained(self) -> nn.Parameter:
        """The parameter whose gradient is not zero while the update is: B, or the rows."""
        return self.lora_rows if self.spec.kind == "rows" else self.lora_B

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """The terms that the adapter adds to the weight."""
        trained, frozen = self._trained_term(), self.frozen
        return (trained,) if frozen is None else (trained, frozen)

    @property
    def total_magnitude(self) -> torch.Tensor | None:
        """The norms of the rows of the effective weight, (out_features,), fp32; None without DoRA."""
        return self.first_magnitude + self.magnitude.float() if self.spec.kind == "dora" else None

    @torch.no_grad()
    def stored(self) -> StoredAdapter:
        """Return the adapter as PEFT stores it: all its terms as one, without components that are zero."""
        trained = self._trained_term()
        if isinstance(trained, SparseRows):
            trained = trained.as_low_rank(self.out_features)
        used = trained.A.any(1) | trained.B.any(0)
        used[0] |= not used.any()
        whole = LowRank(trained.A[used], trained.B[:, used], trained.scaling).joined(self.frozen)
        return StoredAdapter(whole.A, whole.B, whole.scaling, self.total_magnitude)

    @property
    def is_stored_exactly(self) -> bool:
        """Whether the parameters are those of :meth:`stored`, and can be read back from there."""
        terms = (self.frozen, self.removed, self.null_space)
        is_plain = self.spec.kind == "lora" and all(term is None for term in terms)
        return is_plain and len(self.stored().A) == self.spec.rank

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return the sum of the adapter's terms, without a scale of the rows, (out_features, in_features), fp32."""
        device = self.base.weight.device
        zeros = torch.zeros(self.out_features, self.in_features, device=device)
        return fold(zeros, self._cast(torch.float32), out=zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of `x`."""
        spec = self.spec
        if self.is_off or self.is_at_start:
            fixed = self._fixed_term()
            if fixed is None:
                return self.base(x)
            # In the form of the whole layer, so that it rounds as that does at first.
            product = Product(self.base, (fixed,), "separate" if spec.dropout else spec.form)
            magnitude = None if self.is_off else self.kept_magnitude
        else:
            product, magnitude = self._product(), self.total_magnitude
        return lora_linears(x, [product])[0] if magnitude is None else dora_linear(x, product, magnitude)

    def extra_repr(self) -> str:
        """Return kind, rank, scaling and dropout."""
        spec = self.spec
        return f"{spec.kind}, rank={spec.rank}, scaling={spec.scaling:g}, dropout={spec.dropout}"

    @property
    def _is_alone(self) -> bool:
        """Whether the layer has to be called by itself: it computes something else, or has hooks."""
        return self.is_off or self.is_at_start or self.spec.kind == "dora" or has_hooks(self)

    def _product(self) -> Product:
        """Return the product that the layer computes with its trained terms."""
        dropout = self.spec.dropout if self.training else 0.0
        # Drawn from the CPU's generator, which recomputation restores, so that the host does not wait for the device.
        seed = int(torch.randint(2**31, ())) if dropout else 0
        return Product(self.base, self.deltas, self.spec.form, dropout, seed)

    def _fixed_term(self) -> LowRank | None:
        """Return the term that stays where the adapters are off, or at their start."""
        return self.kept if self.kept is not None and not self.is_off else self.first

    def _trained_term(self) -> LowRank | SparseRows:
        if self.spec.kind == "rows":
            return SparseRows(self.lora_rows, self.row_index)
        A, removed = self._used_A(), self.removed
        B: torch.Tensor = self.lora_B
        if removed is not None:
            # B A − B₀ A₀ = B (A − A₀) + (B − B₀) A₀, of which both parts are exactly zero at first.
            A, B = torch.cat([A - removed.A, removed.A]), torch.cat([B, B - removed.B], dim=1)
        return LowRank(A, B, self.spec.scaling)

    def _used_A(self) -> torch.Tensor:  # noqa: N802
        """Return A without its part in the null space, A (I − V Vᵀ) in fp32 (LoRA-Null, arXiv:2503.02659)."""
        if self.null_space is None:
            return self.lora_A
        A = self.lora_A.float()
        return A - (A @ self.null_space) @ self.null_space.T

    def _base_weight(self, dtype: torch.dtype | None) -> torch.Tensor:
        """Return the base's weight, (out_features, in_features), as products in `dtype` use it."""
        if isinstance(self.base, nn.Linear):
            return self.base.weight if dtype is None else self.base.weight.to(dtype)
        return self.base.dequantize(self.base.quant_state.dtype if dtype is None else dtype)

    def _cast(self, dtype: torch.dtype) -> list[Delta]:
        return [delta.make(*(tensor.to(dtype) for tensor in delta.tensors)) for delta in self.deltas]


def linears_of(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Return the outputs of linear layers for the same x, by one node of the graph where all of them are adapted.

    Args:
        x: (..., in_features).
        layers: Layers of any kind.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear) and not layer._is_alone]
    if len(adapted) < len(layers) or not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    return lora_linears(x, [layer._product() for layer in adapted])


def draw(init: str, rank: int, in_features: int, generator: torch.Generator) -> torch.Tensor:
    """Return initial values of A that need nothing but a seed, (rank, in_features), fp32 on the CPU.

    Args:
        init: `kaiming`, uniform within ±1 / sqrt(in_features), as in PEFT; `gaussian`, with deviation 1 / rank; or
            `orthogonal`, with orthonormal rows.
        rank: Number of rows.
        in_features: Number of columns.
        generator: A CPU generator.

    Raises:
        ValueError: There is no such init.
    """
    if init not in DRAWN_INITS:
        raise ValueError(f"init {init!r} should be one of {', '.join(DRAWN_INITS)}")
    values = torch.empty(rank, in_features)
    if init == "gaussian":
        return nn.init.normal_(values, std=1 / rank, generator=generator)
    if init == "orthogonal":
        return orthogonal(rank, in_features, generator)
    return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
