"""The level of recomputation and the weight cache that fit into a device's memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora.config import RunConfig
from qlora.data import Batch
from qlora.errors import ModelError
from qlora.layers import apply_recompute, cache_weights, recompute_levels
from qlora.layers.placement import placed_weights, uneven_passes
from qlora.lora import RecomputedWeights, choose_form
from qlora.lora.host_rows import host_rows
from qlora.memory.estimate import (
    CUDA_CONTEXT_BYTES,
    MARGIN,
    Estimate,
    available_bytes,
    check_host,
    choose_level,
    estimate,
)
from qlora.memory.probe import measure_peak, run_passes
from qlora.model import Loss, free_host_bytes
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes

# Share of the host's free memory that the weight cache may take; other programs need some too.
HOST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run uses memory.

    Attributes:
        level: Level of recomputation.
        why: Reason for the level.
        num_cached: Number of dequantized weights that are cached.
        estimated: Predicted bytes of the largest micro-batch, without cached weights; None if they are not known.
        measured: Bytes that the allocator reserved for it; None if it was not tried.
        available: Bytes that the run may take.
        by_kind: The predicted bytes by kind; None if they are not known.
        levels: Levels that the run may change to, which fit the host; none if the config sets the level.
    """

    level: str
    why: str
    num_cached: int
    estimated: int | None
    measured: int | None
    available: int
    by_kind: dict[str, int] | None = None
    levels: Sequence[str] = ()


def fit_memory(config: RunConfig, model: Any, loss: Loss, largest: Batch, processes: Processes) -> Fit:
    """Apply the fastest level of recomputation that fits, and cache dequantized weights in the memory that is left.

    Results are equal bit for bit at every level except with tiles. On CUDA, the largest micro-batch is tried before the
    first step, which corrects the estimate. All processes use what fits the one with the least memory.

    Args:
        config: Config of the run.
        model: Model with adapters, in training mode.
        loss: Loss that is minimized.
        largest: Largest micro-batch of the run, on the model's device.
        processes: Processes of the run.

    Raises:
        ModelError: No level fits, or the level that the config sets does not; raised on all processes.
    """
    device, tokens = model.device, largest.input_ids.numel()
    available = available_bytes(device, _num_bytes(model))
    available = int(-processes.max(-available))
    placed = placed_weights(model)
    place: dict[str, Any] = {"is_loaded": True, "host_free": _host_free(model, processes)}
    if placed is not None:
        place |= {"weights": placed.kind, "processes": processes.world_size}
    levels = recompute_levels(model)
    level: str = config.model.recompute
    try:
        # Most often the fastest level fits, and each takes time to predict.
        first = levels[:1] if level == "auto" else [level]  # on CUDA all are predicted anyway
        expected, unknown = replace(estimate(config, loss, device, first), **place), ""
        if level == "auto":
            if expected.levels == first and not expected.fits(first[0], available, tokens):
                expected = replace(estimate(config, loss, device), **place)
            if expected.levels != first:
                levels = [each for each in levels if each in expected.levels]
    except ModelError as error:
        expected, unknown = None, str(error)
    why = "set by model.recompute"
    if level != "auto":
        levels = [level]
        if expected is not None:
            check_host(expected, tokens, levels)
    elif expected is None:
        # On a GPU the levels are tried, the fastest first; elsewhere the level that takes the least memory is safe.
        level = levels[0] if device.type == "cuda" else levels[-1]
        why = f"the memory of a step is unknown: {unknown}"
    else:
        # A trial with too little host memory would not be refused, but killed.
        levels = [level for level in levels if expected.fits_host(level, tokens)] or levels
        try:
            level, why = choose_level(expected, available, tokens, levels)
        except ModelError as error:
            if device.type != "cuda":
                raise
            level, why = levels[-1], str(error)  # the trial decides
    measured = None
    if device.type == "cuda":
        level, measured, why = settle_level(
            levels,
            level,
            why,
            limit=(1 - MARGIN) * available,
            # With sharded weights a trial that runs out of memory would end the run, so none is made without need.
            expected=None if placed is not None and placed.kind == "sharded" else expected,
            tokens=tokens,
            measure=lambda level: processes.max(_try(model, loss, largest, level)),
        )
        # The trial does not run the optimizer's step.
        measured = max(measured, 0 if expected is None else expected.update_bytes)
    apply_recompute(model, level)
    by_kind = None if expected is None else expected.bytes_by_kind(level, tokens)
    estimated = None if by_kind is None else sum(by_kind.values())
    num_cached = 0
    taken = estimated if measured is None else measured
    if taken is not None and config.model.weight_cache == "auto" and _is_cache_used(config, tokens, device):
        left = (1 - MARGIN) * available - taken
        num_cached = cache_weights(model, left if device.type == "cuda" else HOST_SHARE * left)
    return Fit(
        level=level, why=why, num_cached=num_cached, estimated=estimated, measured=measured, available=available,
        by_kind=by_kind, levels=levels if config.model.recompute == "auto" else (),
    )  # fmt: skip


def settle_level(
    levels: Sequence[str],
    level: str,
    why: str,
    *,
    limit: float,
    expected: Estimate | None,
    tokens: int,
    measure: Callable[[str], float],
) -> tuple[str, int, str]:
    """Try a level, and correct the choice by what it takes.

    Args:
        levels: Levels to choose from, the fastest first.
        level: Level to try first.
        why: Reason for that level.
        limit: Largest number of bytes that a level may take.
        expected: Estimate of every level; None if there is none.
        tokens: Number of tokens of the largest micro-batch.
        measure: Returns the bytes that a level takes, or infinity if memory runs out.

    Returns:
        The level, the bytes that it takes, and the reason for it.

    Raises:
        ModelError: No level fits.
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
            "train.micro_batch_size, data.max_seq_len or lora.rank, or use a smaller base."
        )
    if failed:
        return candidate, int(measured), f"{candidate} took {_gib(measured)} of {_gib(limit)} when tried; {failed[-1]}"
    if expected is not None:
        # The estimates of all levels are likely wrong by the same factor.
        correction = measured / expected.total_bytes(candidate, tokens)
        for cheaper in levels[: levels.index(candidate)]:
            if correction * expected.total_bytes(cheaper, tokens) <= limit:
                taken = measure(cheaper)
                if taken <= limit:
                    why = f"{cheaper} took {_gib(taken)} of {_gib(limit)} when tried, less than expected"
                    return cheaper, int(taken), why
                break
    return candidate, int(measured), why


def _try(model: Any, loss: Loss, batch: Batch, level: str) -> float:
    """Return the bytes that forward, backward and CUDA's context take; infinity if memory runs out.

    They are those that the allocator reserves, which is a conservative measure: where its memory is fragmented they
    are more than those of tensors, and it would free cached blocks and try again before memory runs out.
    """
    apply_recompute(model, level)
    torch.cuda.empty_cache()  # what loading reserved is free for the trial
    try:
        with uneven_passes(model, is_retried=True):
            measure_peak(lambda: run_passes(model, batch, loss), model.device)
        return torch.cuda.max_memory_reserved(model.device) + CUDA_CONTEXT_BYTES
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    finally:
        RecomputedWeights.clear()
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)


def _is_cache_used(config: RunConfig, tokens: int, device: torch.device) -> bool:
    # On a GPU, folding reads the 4-bit codes, which are fewer bytes than a cached weight.
    lora = config.lora
    form = choose_form(lora.form, tokens, device, lora.dropout, lora.kind == "dora")
    return config.model.quantization == "nf4" and (device.type == "cpu" or form == "separate")


def _host_free(model: Any, processes: Processes) -> int:
    """Return the host memory that each process may take, with what its weights take there already."""
    placed = placed_weights(model)
    taken = placed.stored_bytes if placed is not None and placed.kind == "host" else 0
    taken += sum(piece.nbytes for pieces in host_rows(model).values() for piece in pieces)
    return int(-processes.max(-(free_host_bytes() + taken)))


def _num_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters; of placed weights, of those that this process keeps."""
    placed = placed_weights(model)
    own = [each for each in model.parameters() if placed is None or each.dtype != torch.uint8]
    return sum(each.nbytes for each in own) + (0 if placed is None else placed.stored_bytes)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
