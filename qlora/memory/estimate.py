"""Prediction of a run's peak memory, and the level of recomputation that fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qlora.config import RunConfig
from qlora.errors import ModelError
from qlora.kernels.head import default_chunk
from qlora.layers.placement import PlacedBytes, placed_bytes
from qlora.layers.recompute_mlp import TILE_TOKENS
from qlora.memory.footprint import Footprint, take_footprint
from qlora.memory.timeline import HEAD, Moment
from qlora.model import (
    Loss,
    base_files,
    free_host_bytes,
    load_processor,
    resolve_compute_dtype,
    resolve_device,
    with_images,
)

KINDS = ("weights", "adapters", "optimizer", "activations", "loss", "buffers", "context")
# Memory that CUDA and its libraries take before any tensor: assumed, because it differs by driver and device.
CUDA_CONTEXT_BYTES = 1 << 29
# Share of the free memory that stays free, for fragmentation and errors of the prediction.
MARGIN = 0.05
MOST_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of a run by level of recomputation and number of tokens.

    Attributes:
        footprint: Bytes of the model and of a step.
        device: Device of the run.
        dtype: Compute dtype.
        micro_batch_size: Number of sequences per micro-batch.
        max_seq_len: Largest number of tokens per sequence; an image is one of one token.
        packing: Whether the sequences of a micro-batch are joined into one.
        chunk_tokens: Number of tokens of a micro-batch whose logits are in memory at a time.
        group_size: Number of documents that are trained together, of `max_seq_len` tokens each in a sequence.
        of_images: Whether the sequences are images.
        weights: Where the 4-bit weights of the layers are.
        processes: Number of processes of the run, each with a device and micro-batches of its own.
        host_free: Bytes of host memory that each process may take, besides a device of its own; None if not known.
        is_loaded: Whether the base has been loaded, so that only what follows can be the peak.
    """

    footprint: Footprint
    device: torch.device
    dtype: torch.dtype
    micro_batch_size: int
    max_seq_len: int
    packing: bool
    chunk_tokens: int
    group_size: int = 1
    of_images: bool = False
    weights: str = "device"
    processes: int = 1
    host_free: int | None = None
    is_loaded: bool = False

    @property
    def placed(self) -> PlacedBytes:
        """Bytes of placed weights per process; zeros if they are on the device."""
        packed = [layer for layer in self.footprint.layers_packed if layer]
        if self.weights == "device" or not packed:
            return PlacedBytes(0, 0, 0)
        footprint = self.footprint
        passes = footprint.passes
        layers = placed_bytes(self.weights, packed, self.processes, passes.order)
        return layers._replace(
            host=layers.host + footprint.embedding + footprint.head,
            copied=layers.copied + passes.head_copies * footprint.head,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base that are on the device all the time."""
        footprint, placed = self.footprint, self.placed
        moved = sum(footprint.layers_packed) + footprint.embedding + footprint.head if any(placed) else 0
        on_host = placed.host if self.device.type == "cpu" else 0  # which is the device
        return footprint.weights - moved + placed.device + on_host

    @property
    def leaving_bytes(self) -> int:
        """Bytes of embedding and head that are on the device only until adapters are added to the loaded base."""
        leaves = any(self.placed) and self.device.type != "cpu"
        return self.footprint.embedding + self.footprint.head if leaves else 0

    @property
    def context_bytes(self) -> int:
        """Bytes that CUDA takes before any tensor."""
        return CUDA_CONTEXT_BYTES if self.device.type == "cuda" else 0

    @property
    def loaded_bytes(self) -> int:
        """Bytes in use when the base has been loaded, before adapters are added."""
        return self.weight_bytes + self.leaving_bytes + self.context_bytes

    @property
    def levels(self) -> list[str]:
        """Levels of recomputation, the fastest first."""
        return list(self.footprint.held)

    @property
    def tokens(self) -> int:
        """Number of tokens of the largest micro-batch that the config allows."""
        return self.micro_batch_size * self.max_seq_len * self.group_size

    def bytes_by_kind(self, level: str, tokens: int, row: int | None = None) -> dict[str, int]:
        """Return the bytes at the peak of a step, or of loading where that is higher, by the names of `KINDS`.

        Args:
            level: One of `levels`.
            tokens: Number of tokens of the micro-batch.
            row: Number of tokens of its longest sequence; default: `max_seq_len`.
        """
        row = min(row or self.max_seq_len, tokens)
        if self.packing and self.footprint.rows_attend:
            row = tokens
        footprint = self.footprint
        if level == "offload+tiled" and tokens <= TILE_TOKENS:
            level = "offload"  # a single tile is computed as a whole
        step = max((self._at(each, tokens, row) for each in footprint.held[level]), key=lambda each: sum(each.values()))
        held = {"weights": self.weight_bytes, "adapters": footprint.adapters, "optimizer": footprint.optimizer}
        if footprint.update > sum(step.values()):
            step = dict.fromkeys(step, 0)
            held["optimizer"] += footprint.update
        context = {"context": self.context_bytes}
        found = held | {kind: round(number) for kind, number in step.items()} | context
        if self.is_loaded or self.loaded_bytes <= sum(found.values()):
            return found
        return dict.fromkeys(found, 0) | {"weights": self.weight_bytes + self.leaving_bytes} | context

    def total_bytes(self, level: str, tokens: int, row: int | None = None) -> int:
        """Return the sum of :meth:`bytes_by_kind`."""
        return sum(self.bytes_by_kind(level, tokens, row).values())

    def host_bytes(self, level: str, tokens: int) -> int:
        """Return the bytes of each process in host memory: placed weights, and layer inputs that are offloaded.

        Args:
            level: One of `levels`.
            tokens: Number of tokens of the micro-batch.
        """
        if not level.startswith("offload"):
            return self.placed.host
        # What the layers keep on the device, when all have been computed, where nothing is offloaded.
        kept = self._largest_at_head("full", tokens) - self._largest_at_head("offload", tokens)
        return self.placed.host + max(0, round(kept))

    def fits_host(self, level: str, tokens: int) -> bool:
        """Return whether a micro-batch leaves the margin of the host's memory free.

        True if that is not known, or the host is the device.
        """
        is_counted = self.host_free is not None and self.device.type != "cpu"
        return not is_counted or self.host_bytes(level, tokens) <= (1 - MARGIN) * (self.host_free or 0)

    @property
    def update_bytes(self) -> int:
        """Bytes in use during the optimizer's step, when there are no activations."""
        footprint = self.footprint
        return self.weight_bytes + footprint.adapters + footprint.optimizer + footprint.update + self.context_bytes

    def largest_micro_batch(self, level: str, free_bytes: int) -> int:
        """Return the number of the largest sequences that fit with the margin; 0 if none does."""
        tokens = self.max_seq_len * self.group_size
        return self._most(lambda sequences: self.fits(level, free_bytes, sequences * tokens))

    def longest_context(self, level: str, free_bytes: int) -> int:
        """Return the `max_seq_len` that fits with the margin, at most the model's positions."""
        most = self._most(lambda tokens: self.fits(level, free_bytes, tokens * self.group_size, tokens))
        return most if self.footprint.positions is None else min(most, self.footprint.positions)

    def fits(self, level: str, free_bytes: int, tokens: int, row: int | None = None) -> bool:
        """Return whether a micro-batch leaves the margin free, on the device and on the host."""
        return self.fits_device(level, free_bytes, tokens, row) and self.fits_host(level, tokens)

    def fits_device(self, level: str, free_bytes: int, tokens: int, row: int | None = None) -> bool:
        """Return whether a micro-batch leaves the margin of the device's memory free."""
        return self.total_bytes(level, tokens, row) <= (1 - MARGIN) * free_bytes

    def weight_cache_layers(self, free_bytes: int, level: str, tokens: int) -> int:
        """Return the number of layers, from the first, whose dequantized weights fit with the margin.

        Those of placed weights are not cached.
        """
        if self.weights != "device":
            return 0
        left = (1 - MARGIN) * free_bytes - self.total_bytes(level, tokens)
        count = 0
        for needed in self.footprint.layers_dequantized:
            left -= needed
            if left < 0 or not needed:
                break
            count += 1
        return count

    def _at(self, moment: Moment, tokens: int, row: int) -> dict[str, float]:
        held = moment.held
        filled = min(1.0, tokens / self.chunk_tokens)
        loss = held.loss.at(tokens, row) - (1 - filled) * held.loss.constant
        buffers = held.buffers.at(tokens, row)
        if moment.place != HEAD:
            buffers += self.placed.in_layers
        elif self.weights != "device" and self.footprint.head:  # it comes from the host
            loss += self.footprint.head
            buffers -= self.footprint.freed_for_head
        return {"activations": held.activations.at(tokens, row), "loss": loss, "buffers": buffers}

    def _largest_at_head(self, level: str, tokens: int) -> float:
        """Return the bytes of a step at its largest moment in the head, in sequences of any length."""
        row = min(self.max_seq_len, tokens)
        moments = (moment for moment in self.footprint.held[level] if moment.place == HEAD)
        return max(sum(self._at(moment, tokens, row).values()) for moment in moments)

    @staticmethod
    def _most(fits: Callable[[int], bool]) -> int:
        low, high = 0, 1
        while high < MOST_TOKENS and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def estimate(
    config: RunConfig, loss: Loss, device: str | torch.device = "auto", levels: Sequence[str] | None = None
) -> Estimate:
    """Predict a run's memory from its config and its base's config.json.

    Args:
        config: Config of the run. Its data are not read; the largest micro-batch that it allows is assumed.
        loss: Loss that is minimized.
        device: `auto` for this machine's device; `cuda` also works without one.
        levels: Levels of recomputation to predict, which takes time for each; default: all. On CUDA it is all.

    Raises:
        ModelError: The base's config is not available, or describes a model that can't be trained.
    """
    section = config.model
    device = torch.device("cuda") if str(device) == "cuda" else resolve_device(device)
    absent = device.type == "cuda" and not torch.cuda.is_available()
    dtype = torch.bfloat16 if absent and section.compute_dtype == "auto" else resolve_compute_dtype(
        section.compute_dtype, device
    )  # fmt: skip
    files = base_files(section, with_weights=False)
    row, rows = config.data.max_tokens, config.train.micro_batch_size
    if config.data.has_images:
        loss = with_images(loss, config.data, load_processor(files.folder))
    tokens = rows * row * loss.group_size
    footprint = take_footprint(config, files, device, dtype, tokens=tokens, row=row, loss=loss, levels=levels)
    return Estimate(
        footprint=footprint,
        device=device,
        dtype=dtype,
        micro_batch_size=rows,
        max_seq_len=row,
        packing=config.data.packs and footprint.unpacked_why is None,
        chunk_tokens=_chunk_tokens(footprint, loss, device, dtype),
        group_size=loss.group_size,
        of_images=config.data.has_images,
    )


def _chunk_tokens(footprint: Footprint, loss: Loss, device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of tokens whose logits are in memory at a time; 1 for a head of scores, which has none."""
    if footprint.vocabulary is None:
        return 1
    # Where a loss looks ahead, one document of each group has logits at a time.
    times = 1 if loss.ahead is None else loss.group_size
    return max(1, default_chunk(device, footprint.vocabulary, dtype) // footprint.vocabulary) * times


def choose_level(
    estimate: Estimate, free_bytes: int, tokens: int, levels: Sequence[str] | None = None
) -> tuple[str, str]:
    """Return the fastest level of recomputation that fits, and the reason for it.

    Args:
        estimate: Prediction for the run.
        free_bytes: Bytes that the run may take, including those it has taken already; see :func:`available_bytes`.
        tokens: Number of tokens of the largest micro-batch.
        levels: Levels to choose from; default: all.

    Raises:
        ModelError: No level fits the device, or the host.
    """
    levels = estimate.levels if levels is None else levels
    free, previous = _free(free_bytes), None
    for level in levels:
        if estimate.fits(level, free_bytes, tokens):
            needed = f"it takes {_gib(estimate.total_bytes(level, tokens))} of {free}"
            if previous is None:
                return level, needed
            return level, f"{needed}; {previous} would take {_gib(estimate.total_bytes(previous, tokens))}"
        previous = level
    if of_device := [level for level in levels if estimate.fits_device(level, free_bytes, tokens)]:
        check_host(estimate, tokens, of_device)
    if estimate.leaving_bytes:
        check_loading(estimate, free_bytes)
    least = min(estimate.total_bytes(level, tokens) for level in levels)
    raise ModelError(
        f"A micro-batch of {tokens:,} tokens needs at least {_gib(least)}, but the device has {free}. Lower "
        "train.micro_batch_size, data.max_seq_len or lora.rank, or use a smaller base."
    )


def check_loading(estimate: Estimate, free_bytes: int) -> None:
    """Check that the device has memory for the base while it is loaded, before any adapter or activation.

    Args:
        estimate: Prediction for the run.
        free_bytes: Bytes that the run may take; see :func:`available_bytes`.

    Raises:
        ModelError: The base takes more.
    """
    if estimate.is_loaded or estimate.loaded_bytes <= (1 - MARGIN) * free_bytes:
        return
    leaving = f", of which {_gib(estimate.leaving_bytes)} are for embedding and head until adapters are added"
    setting = "model.weights: auto" if any(estimate.footprint.layers_packed) else "model.quantization: nf4"
    remedy = {"sharded": "Start more processes, or use", "host": "Use"}.get(estimate.weights, f"Set {setting}, or use")
    raise ModelError(
        f"Loading the base takes {_gib(estimate.loaded_bytes)}{leaving if estimate.leaving_bytes else ''}, but the "
        f"device has {_free(free_bytes)}. {remedy} a smaller base."
    )


def check_host(estimate: Estimate, tokens: int, levels: Sequence[str]) -> None:
    """Check that the host has memory for weights that are kept there, and for layer inputs that are offloaded.

    Args:
        estimate: Prediction for the run.
        tokens: Number of tokens of the largest micro-batch.
        levels: Levels of recomputation, of which one is enough.

    Raises:
        ModelError: Every level needs more.
    """
    if any(estimate.fits_host(level, tokens) for level in levels):
        return
    least = min(levels, key=lambda level: estimate.host_bytes(level, tokens))
    of_weights, total = estimate.placed.host, estimate.host_bytes(least, tokens)
    if of_weights <= (1 - MARGIN) * (estimate.host_free or 0):
        what, taken = f"model.recompute: {least}", total - of_weights
        remedy = "set model.recompute: full, or lower train.micro_batch_size or data.max_seq_len"
    else:
        what, taken = f"model.weights: {estimate.weights}", of_weights
        remedy = {
            "host": "split them over more GPUs with model.weights: sharded, or use a smaller base",
            "sharded": "start fewer processes on each machine, or use a base with a smaller vocabulary",
        }[estimate.weights]
    others = "" if taken == total else f", and the run {_gib(total)} in all"
    raise ModelError(
        f"{what} takes {_gib(taken)} of host memory for each process{others}, but there are "
        f"{_free(estimate.host_free or 0)}. Stop other programs, {remedy}."
    )


def available_bytes(device: torch.device, loaded_bytes: int = 0) -> int:
    """Return the bytes of a device that a run may take, including those it has taken already.

    Args:
        device: Device of this machine.
        loaded_bytes: Bytes of a model that is loaded already; not needed on CUDA, where torch counts them.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES  # the call has created the context
    return free_host_bytes() + loaded_bytes


def _free(num_bytes: int) -> str:
    return f"{_gib(num_bytes)}, of which {MARGIN:.0%} stay free"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
