"""Prediction of a run's peak memory, without loading its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.config import RunConfig
from qlora.config.sections import parse_size
from qlora.errors import ConfigError
from qlora.memory.estimate import available_bytes
from qlora.memory.estimate import estimate as estimate_bytes
from qlora.memory.report import MemoryReport, make_report
from qlora.objectives import training_loss
from qlora.training.given import as_config

# A smaller size is a number without its unit.
LEAST_GPU_BYTES = 1 << 28


def estimate(config: RunConfig | str | Path | Mapping[str, Any], gpu: str | None = None) -> MemoryReport:
    """Predict the peak memory of a run by level of recomputation, and what fits; no model is loaded.

    Args:
        config: Config that :func:`qlora.load_config` returned, or what it takes. The base's config.json is enough.
        gpu: Free memory of a GPU that this machine need not have, such as `24GB` or `24GiB`; default: this machine.

    Raises:
        ConfigError: `gpu` is not a size.
        ModelError: The base's config is not available, or describes a model that can't be trained.
    """
    config = as_config(config)
    try:
        size = None if gpu is None else parse_size(gpu)
        if size is not None and size < LEAST_GPU_BYTES:
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(f"gpu: {gpu!r} should be a size such as 24GB or 24GiB.") from None
    predicted = estimate_bytes(config, training_loss(config.train), "auto" if size is None else "cuda")
    free_bytes = available_bytes(predicted.device) if size is None else size
    return make_report(predicted, free_bytes, config.model.recompute)
