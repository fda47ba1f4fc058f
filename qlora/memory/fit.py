"""A run fitted into its device's memory: what is computed again, and which dequantized weights are kept."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora.config import RunConfig
from qlora.data import Batch
from qlora.errors import ModelError
from qlora.layers import apply_recompute, hold_weights, recompute_levels
from qlora.lora import WeightsKept, choose_form
from qlora.memory.estimate import CUDA_CONTEXT_BYTES, MARGIN, Estimate, available_bytes, choose_level, estimate
from qlora.memory.probe import measure_peak
from qlora.model import supervised_loss
from qlora.processes import Processes

# Of the host's memory, which others want too, the share of what is left that weights may be kept in.
HOST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run uses memory.

    Attributes:
        level: Of recomputation.
        why: It is this one.
        num_held: Dequantized weights that are kept.
        estimated: Bytes of the largest micro-batch, without kept weights; None if it can't be told.
        measured: The same, of the allocator; None where it was not tried.
        available: Bytes that the run may take.
    """

    level: str
    why: str
    num_held: int
    estimated: int | None
    measured: int | None
    available: int


def fit_memory(config: RunConfig, model: Any, largest: Batch, processes: Processes) -> Fit:
    """Chooses and sets what costs least time and fits.

    Results are the same bits at every level, but for tiles. Where memory is the device's own, the largest micro-batch
    is tried, so that what does not fit fails before the first step, and what was estimated is corrected. Several
    processes go by the one that has the least memory.

    Args:
        config: Of the run.
        model: With adapters, in training mode.
        largest: Micro-batch of the run, on the model's device.
        processes: Of the run.

    Raises:
        ModelError: Nothing fits, or the level that is asked for does not; on all processes.
    """
    device, tokens = model.device, largest.input_ids.numel()
    available = available_bytes(device, _num_bytes(model))
    if device.type == "cpu":  # which the processes of a machine share
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = int(-processes.max(-available))
    try:
        expected, unknown = estimate(config, device), ""
    except ModelError as error:
        expected, unknown = None, str(error)
    levels = recompute_levels(model)
    level: str = config.model.recompute
    why = "it was asked for"
    if level != "auto":
        levels = [level]
    elif expected is None:
        # Where it can be tried, from the fastest on; else as little as can be.
        level = levels[0] if device.type == "cuda" else levels[-1]
        why = f"what a step takes is not known: {unknown}"
    else:
        levels = [level for level in levels if level in expected.levels]
        try:
            level, why = choose_level(expected, available, tokens, levels)
        except ModelError as error:
            if device.type != "cuda":
                raise
            level, why = levels[-1], str(error)  # it can be tried
    measured = None
    if device.type == "cuda":
        level, measured, why = settle_level(
            levels, level, why, (1 - MARGIN) * available, expected, tokens,
            lambda level: processes.max(_try(model, largest, level)),
        )  # fmt: skip
        # The optimizer's step was not tried.
        measured = max(measured, 0 if expected is None else expected.update_bytes)
    apply_recompute(model, level)
    estimated = None if expected is None else expected.total_bytes(level, tokens)
    num_held = 0
    taken = estimated if measured is None else measured
    if taken is not None and config.model.weight_cache == "auto" and _is_cache_used(config, tokens, device):
        left = (1 - MARGIN) * available - taken
        num_held = hold_weights(model, left if device.type == "cuda" else HOST_SHARE * left)
    return Fit(level, why, num_held, estimated, measured, available)


def settle_level(
    levels: Sequence[str],
    level: str,
    why: str,
    limit: float,
    expected: Estimate | None,
    tokens: int,
    measure: Callable[[str], float],
) -> tuple[str, int, str]:
    """Corrects the choice of a level by trying it.

    Args:
        levels: To choose from, the cheapest in time first.
        level: The first to try.
        why: It is this one.
        limit: Bytes that may be taken.
        expected: What was expected of every level; None if nothing was.
        tokens: Of the largest micro-batch.
        measure: Bytes that a level takes, or infinity if they are not there.

    Returns:
        The level, what it takes, and why it is this one.

    Raises:
        ModelError: None fits.
    """
    failed = []
    for candidate in levels[levels.index(level) :]:
        measured = measure(candidate)
        if measured <= limit:
            break
        failed.append(f"{candidate} {'ran out of memory' if math.isinf(measured) else f'took {_gib(measured)}'}")
    else:
        raise ModelError(
            f"A micro-batch of {tokens} tokens does not fit into {_gib(limit)}: {', '.join(failed)}. Lower "
            "train.micro_batch_size, data.max_seq_len or lora.rank, or take a smaller base."
        )
    if failed:
        return candidate, int(measured), f"{candidate} took {_gib(measured)} of {_gib(limit)} when tried; {failed[-1]}"
    if expected is not None:
        # What is wrong with the estimate of one level is likely wrong with that of another.
        correction = measured / expected.total_bytes(candidate, tokens)
        for cheaper in levels[: levels.index(candidate)]:
            if correction * expected.total_bytes(cheaper, tokens) <= limit:
                taken = measure(cheaper)
                if taken <= limit:
                    told = f"{_gib(taken)} of {_gib(limit)} when tried, less than expected"
                    return cheaper, int(taken), f"{cheaper} took {told}"
                break
    return candidate, int(measured), why


def _try(model: Any, batch: Batch, level: str) -> float:
    """Bytes that forward and backward take, with CUDA's own; infinity if there are not as many."""
    apply_recompute(model, level)
    try:
        return measure_peak(lambda: supervised_loss(model, batch).backward(), model.device) + CUDA_CONTEXT_BYTES
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        WeightsKept.clear()
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)


def _is_cache_used(config: RunConfig, tokens: int, device: torch.device) -> bool:
    # On a GPU, folding reads the 4-bit codes, which are fewer bytes than a kept weight.
    form = choose_form(config.lora.form, tokens, device, config.lora.dropout)
    return config.model.quantization == "nf4" and (device.type == "cpu" or form == "separate")


def _num_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
