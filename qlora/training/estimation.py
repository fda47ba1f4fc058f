"""Prediction of a run's peak memory, without loading its model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora.config import RunConfig
from qlora.errors import ConfigError
from qlora.memory.cards import read_gpu
from qlora.memory.estimate import available_bytes
from qlora.memory.estimate import estimate as estimate_bytes
from qlora.memory.place import check_weights
from qlora.memory.report import MemoryReport, make_report
from qlora.model import Loss, base_files, build_skeleton, free_host_bytes, load_processor, with_images
from qlora.model.quantization import with_linears
from qlora.model.reached import check_reached
from qlora.objectives import training_loss
from qlora.training.given import as_config


def estimate(
    config: RunConfig | str | Path | Mapping[str, Any], gpu: str | None = None, processes: int = 1
) -> MemoryReport:
    """Predict the peak memory of a run by level of recomputation, and what fits; no model is loaded.

    Args:
        config: Config that :func:`qlora.load_config` returned, or what it takes. The base's config.json is enough.
        gpu: A GPU that this machine need not have: its free memory, such as `24GB` or `24GiB`, or its name, such as
            `4090`; default: this machine.
        processes: Number of processes of the run, each with a GPU.

    Raises:
        ConfigError: `gpu` is neither a size nor a known GPU, or there are too few processes.
        ModelError: The base's config is not available, or describes a model that can't be trained with these adapters.
    """
    config = as_config(config)
    if processes < 1:
        raise ConfigError(f"processes: {processes} should be 1 or more.")
    check_weights(config.model, processes)
    try:
        size, card = (None, None) if gpu is None else read_gpu(gpu)
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"gpu: {gpu!r} should be a size such as 24GB or 24GiB, or a GPU such as 4090.") from None
    loss = training_loss(config.train)
    predicted = estimate_bytes(config, loss, "auto" if size is None else "cuda")
    _check_reached(config, loss)
    free_bytes = available_bytes(predicted.device) if size is None else size
    host_free = None
    if size is None and predicted.device.type == "cuda":  # a launcher starts a process for each GPU of a machine
        host_free = free_host_bytes() // min(processes, torch.cuda.device_count())
    return make_report(
        replace(predicted, processes=processes, host_free=host_free),
        free_bytes,
        config.model.recompute,
        config.model.weights,
        config.train.gradient_accumulation_steps,
        card,
    )


def _check_reached(config: RunConfig, loss: Loss) -> None:
    """Check that the loss depends on every adapter; see :func:`qlora.model.reached.check_reached`."""
    files, trust = base_files(config.model, with_weights=False), config.model.trust_remote_code
    skeleton = with_linears(build_skeleton(files, trust, loss.head))
    if config.data.has_images:
        loss = with_images(loss, config.data, load_processor(files.folder, trust))
    check_reached(skeleton, config.lora, loss, config.data.max_tokens)
