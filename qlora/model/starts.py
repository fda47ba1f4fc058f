"""A base loaded with its adapters, and what these start from if that is computed from weights or data."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora.checkpoint import RunDirectory
from qlora.checkpoint.starts import read_starts
from qlora.config import LoraSection, ModelSection, RunConfig
from qlora.data import TokenizedExample, collate
from qlora.errors import CheckpointError, ModelError
from qlora.files import BaseFiles
from qlora.kernels import LowRank
from qlora.lora import LayerStart
from qlora.lora.eva import eva_factors, num_directions
from qlora.lora.initial import Factors, pissa
from qlora.lora.reconstruction import reconstruct, subtract
from qlora.lora.spec import COMPUTED_INITS
from qlora.lora.statistics import InputObserver, InputStatistics
from qlora.model.base_weights import BaseWeights
from qlora.model.device import resolve_compute_dtype
from qlora.model.from_config import adapt, adapter_specs, base_from_section
from qlora.model.loss import model_inputs
from qlora.model.quantization import find_quantized_layers, nf4_settings
from qlora.model.skeleton import build_skeleton
from qlora.nf4 import dequantize, quantize

Starts = Mapping[str, LayerStart]
# Tokens that statistics of inputs are taken from: enough for a few hundred directions, and a second's work on a GPU.
CALIBRATION_TOKENS = 16_384
# A layer's rank with EVA is at most twice the mean, as in PEFT.
EVA_RHO = 2.0


def load_for_training(
    config: RunConfig,
    device: str | torch.device,
    new_ids: range = range(0),
    starts: Starts | None = None,
    examples: Sequence[TokenizedExample] = (),
) -> tuple[Any, Starts]:
    """Load the base that a config names with its adapters, frozen except for these.

    Args:
        config: Config of the run.
        device: Device of the model.
        new_ids: Ids of the tokens that the config adds.
        starts: What the adapters of the run started from; None computes it.
        examples: Examples that statistics of the layers' inputs are taken from, if the initial values need them.

    Returns:
        The model, in evaluation mode, and what its adapters start from: empty if that follows from the seed.

    Raises:
        ModelError: The base can't be loaded or adapted, or is not the one that the starts were computed for.
    """
    section = config.lora
    if starts is not None:
        model = load_started_base(config.model, starts, device)
    elif section.start_from is not None:
        raise NotImplementedError
    elif section.init == "reconstruct":
        model, starts = _reconstructed(config, device)
    else:
        model, _ = base_from_section(config.model, device)
        starts = _COMPUTED.get(section.init, lambda *_: {})(model, section, examples)
    adapt(model, section, config.train.seed, new_ids, starts)
    return model, starts


def load_started_base(section: ModelSection, starts: Starts, device: str | torch.device = "auto") -> Any:
    """Load a base without the terms that its run subtracted before quantizing it.

    Raises:
        ModelError: The base can't be loaded, or its codes are not those that the run trained on.
    """
    if not any(start.subtracted for start in starts.values()):
        return base_from_section(section, device)[0]

    def without(name: str, weight: torch.Tensor) -> torch.Tensor:
        return subtracted(weight, starts.get(name))

    model, _ = base_from_section(section, device, without)
    differing = [name for name, start in starts.items() if not has_codes(start, model.get_submodule(name).weight)]
    if differing:
        raise ModelError(
            f"{section.base}: {len(differing)} layers have other 4-bit codes than the base that the run was started on "
            f"({', '.join(differing[:3])} …); use the same base on the same kind of device."
        )
    return model


def starts_of(config: RunConfig, checkpoint: Path) -> Starts:
    """Return what the adapters of a run started from, as far as that does not follow from the seed.

    Args:
        config: Config of the run.
        checkpoint: Checkpoint of the run, or its final adapter.

    Raises:
        CheckpointError: The run's file of them is missing or damaged.
    """
    if not _has_starts(config):
        return {}
    run = RunDirectory.find(checkpoint)
    if run is None:
        raise CheckpointError(
            f"{checkpoint} is not in the folder of its run, whose starts.safetensors has the initial values of its "
            "adapters; put it back."
        )
    return read_starts(run.starts)


def _has_starts(config: RunConfig) -> bool:
    section = config.lora
    return section.init in COMPUTED_INITS or section.start_from is not None


def subtracted(weight: torch.Tensor, start: LayerStart | None) -> torch.Tensor:
    """Return a weight, (out, in), without the term that is subtracted before it is quantized; fp32 if there is one."""
    term = None if start is None else start.subtracted
    if term is None:
        return weight
    factors = Factors(term.A.to(weight.device), term.B.to(weight.device))
    return subtract(weight, factors, term.scaling)


def has_codes(start: LayerStart, packed: torch.Tensor) -> bool:
    """Return whether 4-bit codes are those that a start was computed for."""
    return start.codes is None or torch.equal(start.codes.cpu(), _digest(packed))


def _digest(packed: torch.Tensor) -> torch.Tensor:
    """Return the SHA-256 of 4-bit codes, (32,) uint8."""
    digest = hashlib.sha256(packed.cpu().contiguous().numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def observe(
    model: Any, names: Sequence[str], examples: Sequence[TokenizedExample], directions: int = 0
) -> dict[str, InputStatistics]:
    """Run a model on the first examples, and return statistics of the inputs of its layers.

    Args:
        model: A causal language model, in evaluation mode.
        names: Names of linear layers.
        examples: Documents; up to `CALIBRATION_TOKENS` tokens of them are read.
        directions: See :class:`InputStatistics`.

    Raises:
        ModelError: There is no example.
    """
    if not len(examples):
        raise ModelError("lora.init: there are no examples to take statistics of the layers' inputs from.")
    left = CALIBRATION_TOKENS
    with InputObserver(model, names, directions) as observer, torch.no_grad():
        for example in examples:
            model.base_model(**model_inputs(model, collate([example]).to(model.device)))
            left -= len(example)
            if left <= 0:
                break
    return observer.statistics


def _eva(model: Any, section: LoraSection, examples: Sequence[TokenizedExample]) -> Starts:
    specs = adapter_specs(model, section)
    ranks = {spec.rank for spec in specs.values()}
    widest = max(model.get_submodule(name).in_features for name in specs)
    statistics = observe(model, list(specs), examples, num_directions(max(ranks), EVA_RHO, widest))
    if unused := [name for name in specs if name not in statistics]:
        raise ModelError(f"lora.init: eva needs inputs, but the model never used {', '.join(unused[:3])}.")
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
        starts[name] = LayerStart(A=A, B=B, frozen=LowRank(A, -B, spec.scaling))
    return starts


_COMPUTED: dict[str, Callable[[Any, LoraSection, Sequence[TokenizedExample]], Starts]] = {
    "eva": _eva,
    "pissa": _pissa,
}


def _reconstructed(config: RunConfig, device: str | torch.device) -> tuple[Any, Starts]:
    """Load a base whose weights are quantized together with the initial adapter, one at a time as they are read."""
    section = config.model
    files = BaseFiles.resolve(section.base, section.revision, section.trust_remote_code)
    skeleton = build_skeleton(files, section.trust_remote_code)
    device = torch.device(device)
    dtype = resolve_compute_dtype(section.compute_dtype, device)
    find_quantized_layers(skeleton, nf4_settings(section.double_quant, dtype), section.base, BaseWeights(files).shapes)
    specs = adapter_specs(skeleton, config.lora)
    starts: dict[str, LayerStart] = {}

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        return dequantize(*quantize(weight.to(dtype), section.double_quant), dtype).float()

    def start(name: str, weight: torch.Tensor) -> torch.Tensor:
        spec = specs.get(name)
        if spec is None:
            return weight
        weight = weight.to(device)
        found = reconstruct(weight, spec.rank, spec.scaling, quantized, dtype=spec.dtype)
        first = LowRank(*found.initial, spec.scaling)
        starts[name] = LayerStart(
            A=first.A, B=first.B, subtracted=LowRank(*found.subtracted, spec.scaling), first=first
        )
        return subtracted(weight, starts[name])

    model, _ = base_from_section(section, device, start)
    if missing := sorted({*specs} - {*starts}):
        raise ModelError(
            f"lora.init: reconstruct is for layers in 4 bits, which {', '.join(missing[:3])} are not; leave them out "
            "of lora.targets, or set another lora.init."
        )
    for name, found in starts.items():
        starts[name] = replace(found, codes=_digest(model.get_submodule(name).weight))
    return model, starts
