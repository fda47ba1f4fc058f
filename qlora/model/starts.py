"""What a run's adapters started from: read again, and subtracted from the base before it is quantized."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from qlora.checkpoint import RunDirectory, read_starts
from qlora.config import ModelSection, RunConfig
from qlora.errors import ModelError
from qlora.lora import Factors, LayerStart, ScoreHead, subtract
from qlora.lora.spec import COMPUTED_INITS
from qlora.model.from_config import base_from_section
from qlora.nf4 import NF4Experts, NF4Linear
from qlora.processes import Processes

# By the names of the layers; empty if all follows from the seed.
Starts = Mapping[str, LayerStart]


def load_started_base(
    section: ModelSection,
    starts: Starts,
    device: str | torch.device = "auto",
    head: ScoreHead | None = None,
    seed: int = 0,
    processes: Processes | None = None,
) -> Any:
    """Load a base without the terms that its run subtracted before quantizing it.

    Args:
        section: Model section of the run's config.
        starts: What the run's adapters started from.
        device: Device of the model.
        head: Head that scores documents, see :func:`load_base`.
        seed: Seed of its initial values.
        processes: Processes that share the weights; None for this one alone.

    Raises:
        ModelError: The base can't be loaded, or its codes are not those that the run trained on.
    """
    if not any(start.subtracted for start in starts.values()):
        return base_from_section(section, device, head=head, seed=seed, processes=processes)

    def without(name: str, weight: torch.Tensor) -> torch.Tensor:
        return subtracted(weight, starts.get(name))

    model = base_from_section(section, device, without, head, seed, processes)
    differing = [name for name, start in starts.items() if not has_codes(start, codes_of(model.get_submodule(name)))]
    if differing:
        raise ModelError(
            f"{section.base}: {len(differing)} layers have other 4-bit codes than the base that the run was started on "
            f"({', '.join(differing[:3])} …); use the same base on the same kind of device."
        )
    return model


def starts_of(config: RunConfig, run: RunDirectory) -> Starts:
    """Return what the adapters of a run started from, as far as that does not follow from the seed.

    Raises:
        CheckpointError: The run's file of them is missing or damaged.
    """
    section, keep = config.lora, config.train.keep
    has_null_space = keep is not None and keep.null_space is not None
    is_computed = section.init in COMPUTED_INITS or section.start_from is not None or has_null_space
    return read_starts(run.starts) if is_computed else {}


def subtracted(weight: torch.Tensor, start: LayerStart | None) -> torch.Tensor:
    """Return a weight, (out, in), without the term that is subtracted before it is quantized; fp32 if there is one."""
    term = None if start is None else start.subtracted
    if term is None:
        return weight
    factors = Factors(term.A.to(weight.device), term.B.to(weight.device))
    return subtract(weight, factors, term.scaling)


def has_codes(start: LayerStart, packed: torch.Tensor) -> bool:
    """Return whether 4-bit codes are those that a start was computed for."""
    return start.codes is None or torch.equal(start.codes.cpu(), codes_digest(packed))


def codes_of(layer: Any) -> torch.Tensor:
    """Return the weight of a layer as it is held, to be read before another layer's."""
    if isinstance(layer, NF4Linear | NF4Experts):
        layer.ensure_present()
    return layer.weight


def codes_digest(packed: torch.Tensor) -> torch.Tensor:
    """Return the SHA-256 of 4-bit codes, (32,) uint8."""
    # A copy, because memory that numpy has seen can't be freed by `fully_shard`.
    digest = hashlib.sha256(packed.to("cpu", copy=True).contiguous().numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
