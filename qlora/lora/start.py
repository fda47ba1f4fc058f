"""What an adapted layer starts from, where that does not follow from a seed: computed once, and kept with the run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

from qlora.kernels import LowRank, SparseRows
from qlora.lora.experts import lora_experts
from qlora.lora.inject import lora_layers
from qlora.lora.linear import LoraLinear
from qlora.lora.rows import trained_rows
from qlora.lora.spec import AdapterSpec

# Fields of `LayerStart` that are low-rank terms.
TERMS = ("frozen", "removed", "subtracted", "first")


@dataclass(frozen=True, slots=True)
class LayerStart:
    """The start of one layer or stack of experts; what is None is as its `reset` sets it.

    Attributes:
        A: Initial A, (rank, in), or (experts, rank, in); with it, B starts at zero unless it is given too.
        B: Initial B, (out, rank), or (experts, out, rank).
        rows: Initial values of trained rows, (rows, in), of a linear layer or of embedding and head, and
        index: their indices in the weight of a linear layer, (rows,).
        magnitude: Initial norms of the effective weight's rows, (out,), fp32.
        frozen: Term that is added and not trained.
        removed: Initial values that are subtracted again.
        subtracted: Term that was subtracted from the base's weight before it was quantized.
        first: Term that stays where the adapters are off; the initial B A if the base was quantized without it.
        null_space: Orthonormal directions of the inputs that A does not see, (in, directions), fp32.
        codes: SHA-256 of the 4-bit codes of the base that the start was computed for, (32,) uint8.
    """

    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    index: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    frozen: LowRank | None = None
    removed: LowRank | None = None
    subtracted: LowRank | None = None
    first: LowRank | None = None
    null_space: torch.Tensor | None = None
    codes: torch.Tensor | None = None

    @property
    def rank(self) -> int | None:
        """Rank of the trained term; None if the config determines it."""
        given = self.A if self.A is not None else self.rows
        return None if given is None else given.shape[-2]

    def update(self, spec: AdapterSpec, out_features: int) -> LowRank | None:
        """Return what the layer adds to its base's weight at first; None if that is zero, or stays where it is off.

        Args:
            spec: Spec of the layer.
            out_features: Number of rows of the layer's weight.
        """
        if self.frozen is not None:  # the trained term on top of it starts at zero
            return self.frozen
        if self.rows is not None and self.index is not None:
            return SparseRows(self.rows.to(spec.dtype), self.index).as_low_rank(out_features)
        if self.A is None or self.B is None or self.removed is not None:
            return None
        trained = LowRank(self.A, self.B, spec.scaling)
        is_first = self.first is not None and all(map(torch.equal, trained.tensors, self.first.tensors))
        return None if is_first else trained

    @torch.no_grad()
    def apply(self, layer: LoraLinear, dtype: torch.dtype | None) -> None:
        """Set a layer's initial values and frozen terms.

        Args:
            layer: A layer with this rank, after :meth:`LoraLinear.reset`.
            dtype: Compute dtype.
        """
        values = {"lora_A": self.A, "lora_B": self.B, "lora_rows": self.rows, "row_index": self.index}
        for name, value in values.items():
            if value is not None:
                getattr(layer, name).copy_(value)
        device = layer.base.weight.device
        for term in ("frozen", "removed", "first"):
            given = getattr(self, term)
            setattr(layer, term, given and given.to(device))
        layer.null_space = None if self.null_space is None else self.null_space.to(device)
        layer.start_magnitude(dtype)
        if self.magnitude is not None:
            layer.first_magnitude.copy_(self.magnitude)


@torch.no_grad()
def apply_starts(model: nn.Module, starts: Mapping[str, LayerStart]) -> None:
    """Set the initial values and frozen terms of a model's adapted layers, experts, embedding and head.

    Those without a start stay as they are.
    """
    dtype = getattr(model, "dtype", None)
    for name, layer in lora_layers(model):
        if name in starts:
            starts[name].apply(layer, dtype)
    for name, experts in lora_experts(model):
        for factor, value in zip((experts.lora_A, experts.lora_B), _experts_start(starts, name), strict=False):
            factor.copy_(value)
    for name, own in trained_rows(model):
        values = starts[name].rows if name in starts else None
        if values is not None:
            own.weight.copy_(values)


@torch.no_grad()
def keep_starts(model: nn.Module, starts: Mapping[str, LayerStart], specs: Mapping[str, AdapterSpec]) -> None:
    """Keep the starts of adapted layers and experts that :func:`qlora.lora.adapters_at_start` needs.

    Args:
        model: A model with adapters.
        starts: Starts of its layers, as far as they don't follow from the seed.
        specs: Specs of the layers in the run.
    """
    for name, layer in lora_layers(model):
        start = starts.get(name, LayerStart())
        update = start.update(specs[name], layer.out_features) if name in specs else None
        layer.kept = update and update.to(layer.base.weight.device)
        magnitude = start.magnitude
        layer.kept_magnitude = None if magnitude is None else magnitude.to(layer.base.weight.device)
    for name, experts in lora_experts(model):
        experts.kept = tuple(value.to(experts.lora_A.device) for value in _experts_start(starts, name))


def _experts_start(starts: Mapping[str, LayerStart], name: str) -> tuple[torch.Tensor, ...]:
    """Return initial A and B of a stack of experts; empty if they follow from the seed."""
    start = starts.get(name, LayerStart())
    return () if start.A is None or start.B is None else (start.A, start.B)


def apply_first(model: nn.Module, starts: Mapping[str, LayerStart]) -> None:
    """Set the terms that stay where the adapters of a model are off."""
    for name, layer in lora_layers(model):
        term, device = starts[name].first if name in starts else None, layer.base.weight.device
        layer.first = term and term.to(device)


def starts_to_tensors(starts: Mapping[str, LayerStart]) -> dict[str, torch.Tensor]:
    """Return the starts of a model's layers as tensors by name, for a file."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, start in starts.items():
        for field in fields(start):
            value = getattr(start, field.name)
            if isinstance(value, LowRank):
                tensors |= {
                    f"{layer}.{field.name}.A": value.A,
                    f"{layer}.{field.name}.B": value.B,
                    f"{layer}.{field.name}.scaling": torch.tensor(value.scaling, dtype=torch.float64),
                }
            elif value is not None:
                tensors[f"{layer}.{field.name}"] = value
    # A copy of each: tensors that share memory can't be written.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def starts_from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, LayerStart]:
    """Return the starts that :func:`starts_to_tensors` wrote.

    Raises:
        ValueError: A tensor is none of these, or a term is incomplete.
    """
    names, parts = {field.name for field in fields(LayerStart)}, ("A", "B", "scaling")
    given: dict[str, dict[str, torch.Tensor]] = {}
    terms: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in tensors.items():
        rest, _, last = key.rpartition(".")
        layer, _, name = rest.rpartition(".")
        if name in TERMS and last in parts:
            terms.setdefault(layer, {}).setdefault(name, {})[last] = tensor
        elif rest and last in names and last not in TERMS:
            given.setdefault(rest, {})[last] = tensor
        else:
            raise ValueError(f"unknown tensor {key}")
    starts, spaces = {}, dict[bytes, torch.Tensor]()
    for layer in given | terms:
        own: dict[str, torch.Tensor | LowRank] = {**given.get(layer, {})}
        for name, term in terms.get(layer, {}).items():
            if set(term) != set(parts):
                raise ValueError(f"{layer}.{name} is incomplete")
            own[name] = LowRank(term["A"], term["B"], float(term["scaling"]))
        if (space := given.get(layer, {}).get("null_space")) is not None:
            # Layers with the same inputs share their directions, which a file holds once for each.
            own["null_space"] = spaces.setdefault(hashlib.sha256(space.numpy().tobytes()).digest(), space)
        starts[layer] = LayerStart(**own)  # type: ignore[arg-type]
    return starts
