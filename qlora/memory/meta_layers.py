"""A model reduced to one layer of each kind on the meta device, from which the memory of all layers is extrapolated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qlora.config import RunConfig
from qlora.errors import ModelError
from qlora.kernels import ExpertGroup, LowRank, experts_at_once, scratch
from qlora.layers.attention import NAME as BY_DOCUMENTS
from qlora.layers.attention import set_text_attention
from qlora.layers.sinks import has_sinks
from qlora.lora import AdapterSpec, LoraLinear, choose_form
from qlora.lora.expert_layer import use_expert_function, wrap_experts
from qlora.lora.mixture import ExpertStack
from qlora.memory.timeline import HEAD, Bytes, Held, Moment
from qlora.model import choose_ways
from qlora.nf4 import NF4Experts, NF4Linear

# Longer than any sequence.
ENDLESS = 1 << 40


class Stack:
    """A model's layers, and one of each kind that represents the others.

    Args:
        model: Skeleton of the model.
        adapted: Linear layers that get adapters, by name.
        specs: Specs of these adapters, by name.
        quantized: Linear layers in 4 bits, by name.
        experts: Weights of experts in 4 bits, by name.
        adapted_experts: Specs of the adapters of experts, by name.
    """

    def __init__(
        self,
        model: Any,
        adapted: dict[str, Any],
        specs: dict[str, AdapterSpec],
        quantized: dict[str, Any],
        experts: Mapping[str, ExpertStack],
        adapted_experts: Mapping[str, AdapterSpec],
    ) -> None:
        self.model, self.adapted, self.specs, self.quantized = model, adapted, specs, quantized
        self.experts, self.adapted_experts = experts, adapted_experts
        self.name, layers = _find_layers(model)
        self.prefixes = [f"{self.name}.{index}." for index in range(len(layers))]
        types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
        self.kinds = [
            (
                type(layer), kind,
                tuple((name, parameter.shape) for name, parameter in layer.named_parameters()),
                tuple(
                    (name, specs[f"{prefix}{name}"].rank) for name, _ in layer.named_modules()
                    if f"{prefix}{name}" in specs
                ),
                tuple(
                    (name, adapted_experts[f"{prefix}{name}"].rank) for name, _ in layer.named_parameters()
                    if f"{prefix}{name}" in adapted_experts
                ),
            )
            for layer, kind, prefix in zip(layers, types, self.prefixes, strict=False)
        ]  # fmt: skip
        last = {kind: index for index, kind in enumerate(self.kinds)}
        self.kept = sorted({0, *last.values()})
        self.last = last
        self.layers = [layers[index] for index in self.kept]

    def reduce(self, config: RunConfig, device: torch.device, tokens: int) -> None:
        """Remove all other layers from the model, and quantize and adapt those that remain."""
        model, lora, self.device = self.model, config.lora, device
        form = choose_form(lora.form, tokens, device, lora.dropout, lora.kind == "dora")
        prefixes = tuple(self.prefixes[index] for index in self.kept)
        for name in {**self.quantized, **self.adapted}:
            if name.startswith(prefixes):
                layer = model.get_submodule(name)
                if name in self.quantized:
                    layer = _EmptyLinear(layer, device)
                if name in self.adapted:
                    layer = LoraLinear(layer, replace(self.specs[name], form=form))
                    if config.train.keep is not None and config.train.keep.null_space is not None:
                        layer.null_space = torch.empty(layer.in_features, 1, device="meta")
                    if lora.init == "pissa":
                        layer.removed = LowRank(torch.empty_like(layer.lora_A), torch.empty_like(layer.lora_B), 1.0)
                model.set_submodule(name, layer)
        for name, stack in self.experts.items():
            if name.startswith(prefixes):
                experts = model.get_submodule(stack.layer)
                delattr(experts, stack.part)
                experts.add_module(stack.part, _EmptyExperts(stack, device))
        wrap_experts(model, {name: spec for name, spec in self.adapted_experts.items() if name.startswith(prefixes)})
        if self.experts:
            use_expert_function(model)
        model.set_submodule(self.name, nn.ModuleList(self.layers))
        text = model.config.get_text_config()
        types = [text.layer_types[index] for index in self.kept] if getattr(text, "layer_types", None) else None
        text.num_hidden_layers = len(self.kept)
        if types and text.layer_types != types:  # Falcon H1's follow from their number and can't be set
            text.layer_types = types
        model.train()
        largest = self._largest_scratch(form, device)
        dtype = model.dtype
        self.scratch = scratch((1, largest), dtype, torch.device("meta"))
        # On a GPU the backward runs in another thread, which has a scratch buffer of its own.
        times = 2 if device.type == "cuda" else 1
        self.always = Held(buffers=Bytes(times * largest * dtype.itemsize))

    def _largest_scratch(self, form: str, device: torch.device) -> int:
        """Return the number of elements of the largest weight that is written into the scratch buffer."""
        # On a CPU these are only folded 16-bit weights: dequantizing allocates a new tensor there.
        written = self.quantized if device.type == "cuda" else {}
        if form == "folded":
            written = {name: one for name, one in self.adapted.items() if name not in self.quantized} | written
        of_experts = [self._numel_of_group(stack) for stack in self.experts.values()] if device.type == "cuda" else []
        return max([*of_experts, *(module.weight.numel() for module in written.values())], default=0)

    def _numel_of_group(self, stack: ExpertStack) -> int:
        """Return the number of weights of a stack that are dequantized at a time on a GPU."""
        largest = max(math.prod(other.sizes) for other in self.experts.values() if other.layer == stack.layer)
        size = experts_at_once(torch.device("cuda"), self.model.dtype, largest, try_kernels=False)
        return min(size, stack.shape[0]) * math.prod(stack.sizes)

    def extrapolate(self, moments: Sequence[Moment], layers_hold: Sequence[Held]) -> list[Moment]:
        """Return the moments of a step with all layers.

        Args:
            moments: Moments of a step with the layers that are kept.
            layers_hold: Memory of each kept layer between its forward and its backward.
        """
        hold = {kind: layers_hold[self.kept.index(index)] for kind, index in self.last.items()}
        below, extras = Held(), {}
        for index, kind in enumerate(self.kinds):
            if index in self.kept:
                extras[self.kept.index(index)] = below
            else:
                below = below.plus(hold[kind])
        extras[HEAD] = below
        return [Moment(moment.place, moment.held.plus(extras[moment.place])) for moment in moments]


def _find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        is_list = id(module) in inside and isinstance(module, nn.ModuleList) and len(module) > 0
        if is_list and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            return name, module
    raise ModelError(
        f"{type(model).__name__} has no layers of transformers' GradientCheckpointingLayer, so its memory can't be "
        "estimated."
    )


class _EmptyLinear(NF4Linear):
    """A quantized linear layer on the meta device, which bitsandbytes does not support."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        packed = torch.empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        super().__init__(packed, SimpleNamespace(shape=linear.weight.shape), linear.bias)
        self._writes_scratch = device.type == "cuda"

    def weight_for_product(self, dtype: torch.dtype, deltas: Any = (), lasting: bool = False) -> torch.Tensor:
        """Return a meta tensor in the same kind of memory as the real layer's weight."""
        if self._writes_scratch and not lasting:
            return scratch(self.quant_state.shape, dtype, self.weight.device)
        return torch.empty(self.quant_state.shape, dtype=dtype, device="meta")


class _EmptyExperts(NF4Experts):
    """Experts in 4 bits on the meta device."""

    def __init__(self, stack: ExpertStack, device: torch.device) -> None:
        codes = -(-math.prod(stack.sizes) // 2)
        super().__init__(torch.empty(stack.shape[0], codes, dtype=torch.uint8, device="meta"), {}, {}, stack.shape)
        self._device = device

    @property
    def device(self) -> torch.device:
        """Device of the run."""
        return self._device

    def weights_for_product(self, group: ExpertGroup, dtype: torch.dtype, update: Any = None) -> torch.Tensor:
        """Return a meta tensor in the same kind of memory as the real experts' weights."""
        shape = len(group.experts), *self.shape[1:]
        if self._device.type == "cuda":
            return scratch(shape, dtype, self.weight.device)
        return torch.empty(shape, dtype=dtype, device="meta")


def set_attention(model: Any, config: RunConfig, device: torch.device, row: int, packed: bool) -> None:
    """Set the attention that a run would use, as far as it affects memory."""
    if config.model.attention == "eager":
        set_text_attention(model, "eager")
    choose_ways(model, any_attention=config.model.attention == "auto", packed=packed)
    if device.type == "cuda" and model.config._attn_implementation == BY_DOCUMENTS and not has_sinks(model):
        set_text_attention(model, "sdpa")  # one kernel for all documents keeps as much as for a single one
    by_documents = device.type == "cuda" and packed and model.config._attn_implementation == "sdpa"
    for holder in (model.config.get_text_config(), *model.modules()):
        window = getattr(holder, "sliding_window", None)
        if isinstance(window, int):
            # The traced sequences are short: 1 is below their length where the run's window is below `row`.
            holder.sliding_window = 1 if row > window and not by_documents else ENDLESS
