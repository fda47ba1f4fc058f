"""A base loaded to be trained: with its adapters, and what these start from, computed from weights or data."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qlora.checkpoint.adapter import check_fits
from qlora.checkpoint.adapter_rows import load_rows
from qlora.config import LoraSection, RunConfig
from qlora.data import TokenizedExample
from qlora.errors import ModelError
from qlora.kernels import LowRank
from qlora.layers.placement import placed_weights
from qlora.lora import (
    InputStatistics,
    LayerStart,
    ScoreHead,
    eva_factors,
    keep_starts,
    lora_layers,
    num_directions,
    pissa,
    reconstruct,
    starts_from_tensors,
    starts_to_tensors,
    trained_rows,
)
from qlora.lora.head import SCORES
from qlora.lora.host_rows import keep_rows_on_host
from qlora.model.base_weights import BaseWeights
from qlora.model.device import resolve_compute_dtype
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.from_config import adapt, adapter_specs, base_files, base_from_section, expert_specs
from qlora.model.null_space import hide_inputs
from qlora.model.observe import observe
from qlora.model.quantization import find_quantized_layers, settings_of_base
from qlora.model.skeleton import build_skeleton
from qlora.model.start_from import open_start, starts_from_adapter
from qlora.model.starts import Starts, codes_digest, codes_of, load_started_base, subtracted
from qlora.nf4 import dequantize, quantize
from qlora.processes import Processes

# Directions of its inputs by which a layer's lost weights are weighed.
MOMENT_DIRECTIONS = 128
# A layer's rank with EVA is at most twice the mean, as in PEFT.
EVA_RHO = 2.0


def load_for_training(
    config: RunConfig,
    device: str | torch.device,
    new_ids: range = range(0),
    starts: Starts | None = None,
    examples: Sequence[TokenizedExample] = (),
    old_examples: Sequence[TokenizedExample] | None = None,
    is_reference: bool = False,
    head: ScoreHead | None = None,
    processes: Processes | None = None,
) -> tuple[Any, Starts]:
    """Load the base that a config names with its adapters, frozen except for these.

    Args:
        config: Config of the run.
        device: Device of the model.
        new_ids: Ids of the tokens that the config adds.
        starts: What the adapters of the run started from; None computes it.
        examples: Examples that statistics of the layers' inputs are taken from, if the initial values need them.
        old_examples: Examples whose inputs the adapters are not to see; None for none, or if they are in the starts.
        is_reference: Whether the model at its start is what training compares with, so that it is kept.
        head: Head of scores of whole documents that is trained, in place of the one over the vocabulary.
        processes: Processes that share the weights; None for this one alone.

    Returns:
        The model, in evaluation mode, and what its adapters start from: empty if that follows from the seed.

    Raises:
        ModelError: The base can't be loaded or adapted, or is not the one that the starts were computed for.
    """
    section, seed, adapter = config.lora, config.train.seed, None
    if starts is not None:
        model = load_started_base(config.model, starts, device, head, seed, processes)
    elif section.start_from is not None:
        source = open_start(config)
        adapter = source.read()
        model = load_started_base(config.model, source.starts(), device, head, seed, processes)
        check_fits(model, adapter)
        specs, experts = adapter_specs(model, section), expert_specs(model, section)
        starts = starts_from_adapter(config, source, adapter, specs, experts, head)
    elif section.init == "reconstruct":
        model, starts = _reconstructed(config, device, examples, head, processes)
    else:
        model = base_from_section(config.model, device, head=head, seed=seed, processes=processes)
        starts = _COMPUTED.get(section.init, lambda *_: {})(model, section, examples)
    adapt(model, section, seed, new_ids, starts)
    if adapter is not None and adapter.rows:
        load_rows(model, adapter.rows, adapter.tensors, optional=SCORES)
        if is_reference:  # to have them when the run is continued; otherwise its checkpoints do
            starts = {**starts, **{name: LayerStart(rows=own.weight.detach()) for name, own in trained_rows(model)}}
    if old_examples is not None:
        starts = hide_inputs(model, starts, old_examples)
    if is_reference:
        keep_starts(model, starts, {name: layer.spec for name, layer in lora_layers(model)})
        for _, own in trained_rows(model):
            own.kept = own.weight.detach().clone()
    if placed_weights(model) is not None:
        keep_rows_on_host(model)
    # Copies on the host: what the layers hold is theirs.
    return model, starts_from_tensors(starts_to_tensors(starts))


def _eva(model: Any, section: LoraSection, examples: Sequence[TokenizedExample]) -> Starts:
    specs = adapter_specs(model, section)
    ranks = {spec.rank for spec in specs.values()}
    widest = max(model.get_submodule(name).in_features for name in specs)
    statistics = observe(model, list(specs), "lora.init", examples, num_directions(max(ranks), EVA_RHO, widest))
    starts: dict[str, LayerStart] = {}
    for rank in ranks:  # layers with ranks of their own share these among themselves
        own = {name: statistics[name] for name, spec in specs.items() if spec.rank == rank}
        starts |= {name: LayerStart(A=A) for name, A in eva_factors(own, rank, EVA_RHO).items()}
    return starts


def _pissa(model: Any, section: LoraSection, examples: Sequence[TokenizedExample]) -> Starts:
    del examples
    starts = {}
    for name, spec in adapter_specs(model, section).items():
        layer = model.get_submodule(name)
        weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.dequantize(torch.float32)
        A, B = (factor.to(spec.dtype) for factor in pissa(weight, spec.rank, spec.scaling))
        starts[name] = LayerStart(A=A, B=B, removed=LowRank(A, B, spec.scaling))
    return starts


_COMPUTED: dict[str, Callable[[Any, LoraSection, Sequence[TokenizedExample]], Starts]] = {
    "eva": _eva,
    "pissa": _pissa,
}


def _reconstructed(
    config: RunConfig,
    device: str | torch.device,
    examples: Sequence[TokenizedExample],
    head: ScoreHead | None,
    processes: Processes | None,
) -> tuple[Any, Starts]:
    """Load a base whose weights are quantized together with the initial adapter, one at a time as they are read."""
    section = config.model
    files = base_files(section)
    if weight_format(files, section.quantization) == BITSANDBYTES_4BIT:
        raise ModelError(
            f"lora.init: reconstruct needs the weights before they are quantized, but {section.base} has only 4-bit "
            "ones; set model.base to the 16-bit model that it was made from."
        )
    skeleton = build_skeleton(files, section.trust_remote_code, head)
    device = torch.device(device)
    dtype = resolve_compute_dtype(section.compute_dtype, device)
    settings = settings_of_base(files, skeleton, section.quantization, section.double_quant, dtype, section.keep_16bit)
    layers = find_quantized_layers(skeleton, settings, section.base, BaseWeights(files).shapes)
    specs = adapter_specs(skeleton, config.lora)
    if missing := sorted({*specs} - {layer.name for layer in layers.values()}):
        raise ModelError(
            f"lora.init: reconstruct is for layers in 4 bits, which {', '.join(missing[:3])} are not; leave them out "
            "of lora.targets, or set another lora.init."
        )
    statistics = _statistics(config, device, examples, processes) if config.lora.calibrate else {}
    starts: dict[str, LayerStart] = {}

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        return dequantize(*quantize(weight.to(dtype), section.double_quant), dtype).float()

    def start(name: str, weight: torch.Tensor) -> torch.Tensor:
        spec = specs.get(name)
        if spec is None:
            return weight
        weight = weight.to(device)
        moment = statistics[name].second_moment() if name in statistics else None
        found = reconstruct(weight, spec.rank, spec.scaling, quantized, second_moment=moment, dtype=spec.dtype)
        first = LowRank(*found.initial, spec.scaling)
        starts[name] = LayerStart(
            A=first.A, B=first.B, subtracted=LowRank(*found.subtracted, spec.scaling), first=first
        )
        return subtracted(weight, starts[name])

    model = base_from_section(section, device, start, head, config.train.seed, processes)
    for name, found in starts.items():
        starts[name] = replace(found, codes=codes_digest(codes_of(model.get_submodule(name))))
    return model, starts


def _statistics(
    config: RunConfig, device: str | torch.device, examples: Sequence[TokenizedExample], processes: Processes | None
) -> dict[str, InputStatistics]:
    """Return statistics of the inputs of a plain base's layers; the base is freed again."""
    model = base_from_section(config.model, device, processes=processes)
    return observe(model, list(adapter_specs(model, config.lora)), "lora.calibrate", examples, MOMENT_DIRECTIONS)
