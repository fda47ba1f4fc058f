"""What a run will hold on its device, whether it fits, and the level of recomputation that does."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.config import RunConfig
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.kernels.cross_entropy import default_chunk
from qlora.layers.recompute_mlp import TILE_TOKENS
from qlora.memory.footprint import Footprint, take_footprint
from qlora.memory.timeline import Held
from qlora.model import Loss, resolve_compute_dtype, resolve_device

KINDS = ("weights", "adapters", "optimizer", "activations", "loss", "buffers", "context")
# What CUDA and its libraries take of a device before a tensor is there: assumed, as it differs by driver and device.
CUDA_CONTEXT_BYTES = 1 << 29
# Share of what is free that stays so: for what the allocator can't use of its blocks, and for what is reckoned wrong.
MARGIN = 0.05
MOST_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of a run by level and tokens.

    Attributes:
        footprint: Of the model and its step.
        device: That the run would be on.
        dtype: That it would compute in.
        micro_batch_size: Rows of a micro-batch.
        max_seq_len: Tokens of a row at most.
        packing: Whether rows are put behind one another into one.
        chunk_tokens: Tokens whose logits are held at a time.
    """

    footprint: Footprint
    device: torch.device
    dtype: torch.dtype
    micro_batch_size: int
    max_seq_len: int
    packing: bool
    chunk_tokens: int

    @property
    def levels(self) -> list[str]:
        """Of recomputation, the cheapest in time first."""
        return list(self.footprint.held)

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch that the config allows for."""
        return self.micro_batch_size * self.max_seq_len

    def bytes_by_kind(self, level: str, tokens: int, row: int | None = None) -> dict[str, int]:
        """What is held when most is, under the names of `KINDS`.

        Args:
            level: One of `levels`.
            tokens: Of a micro-batch.
            row: Of them, those of one row; `max_seq_len` if not given.
        """
        row = min(row or self.max_seq_len, tokens)
        if self.packing and self.footprint.rows_attend:
            row = tokens
        footprint = self.footprint
        if level == "offload+tiled" and tokens <= TILE_TOKENS:
            level = "offload"  # a single tile is not computed apart
        step = max((self._at(held, tokens, row) for held in footprint.held[level]), key=lambda each: sum(each.values()))
        held = {"weights": footprint.weights, "adapters": footprint.adapters, "optimizer": footprint.optimizer}
        if footprint.update > sum(step.values()):
            step = dict.fromkeys(step, 0)
            held["optimizer"] += footprint.update
        context = CUDA_CONTEXT_BYTES if self.device.type == "cuda" else 0
        return held | {kind: round(number) for kind, number in step.items()} | {"context": context}

    def total_bytes(self, level: str, tokens: int, row: int | None = None) -> int:
        """The sum of :meth:`bytes_by_kind`."""
        return sum(self.bytes_by_kind(level, tokens, row).values())

    @property
    def update_bytes(self) -> int:
        """Of the optimizer's step, when there are no activations, with all that is there then."""
        footprint, context = self.footprint, CUDA_CONTEXT_BYTES if self.device.type == "cuda" else 0
        return footprint.weights + footprint.adapters + footprint.optimizer + footprint.update + context

    def largest_micro_batch(self, level: str, free_bytes: int) -> int:
        """Rows of `max_seq_len` tokens that fit, safely; 0 if not one does."""
        return self._most(lambda rows: self.fits(level, free_bytes, rows * self.max_seq_len))

    def longest_context(self, level: str, free_bytes: int) -> int:
        """Tokens of a single row that fit, safely."""
        return self._most(lambda tokens: self.fits(level, free_bytes, tokens, tokens))

    def fits(self, level: str, free_bytes: int, tokens: int, row: int | None = None) -> bool:
        """Whether a micro-batch leaves the margin free."""
        return self.total_bytes(level, tokens, row) <= (1 - MARGIN) * free_bytes

    def weight_cache_layers(self, free_bytes: int, level: str, tokens: int) -> int:
        """Layers, from the first, whose dequantized weights fit beside all else, safely."""
        left = (1 - MARGIN) * free_bytes - self.total_bytes(level, tokens)
        count = 0
        for needed in self.footprint.layers_dequantized:
            left -= needed
            if left < 0 or not needed:
                break
            count += 1
        return count

    def _at(self, held: Held, tokens: int, row: int) -> dict[str, float]:
        filled = min(1.0, tokens / self.chunk_tokens)
        loss = held.loss.at(tokens, row) - (1 - filled) * held.loss.constant
        return {"activations": held.activations.at(tokens, row), "loss": loss, "buffers": held.buffers.at(tokens, row)}

    @staticmethod
    def _most(fits: Callable[[int], bool]) -> int:
        low, high = 0, 1
        while high < MOST_TOKENS and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def estimate(config: RunConfig, loss: Loss, device: str | torch.device = "auto") -> Estimate:
    """Predict a run's memory from its config and its base's config.json.

    Args:
        config: Config of the run. Its data are not read; the largest micro-batch that it allows for is assumed.
        loss: Loss that is minimized.
        device: `auto` for this machine's; `cuda` may also be one that this machine does not have.

    Raises:
        ModelError: The base's config is not available, or describes a model that can't be trained.
    """
    section = config.model
    device = torch.device("cuda") if str(device) == "cuda" else resolve_device(device)
    absent = device.type == "cuda" and not torch.cuda.is_available()
    dtype = torch.bfloat16 if absent and section.compute_dtype == "auto" else resolve_compute_dtype(
        section.compute_dtype, device
    )  # fmt: skip
    files = BaseFiles.resolve(section.base, section.revision, section.trust_remote_code, with_weights=False)
    row, rows = config.data.max_seq_len, config.train.micro_batch_size
    footprint = take_footprint(config, files, device, dtype, tokens=rows * row, row=row, loss=loss)
    return Estimate(
        footprint=footprint,
        device=device,
        dtype=dtype,
        micro_batch_size=rows,
        max_seq_len=row,
        packing=config.data.packing,
        chunk_tokens=max(1, default_chunk(device) // footprint.vocabulary),
    )


def choose_level(
    estimate: Estimate, free_bytes: int, tokens: int, levels: Sequence[str] | None = None
) -> tuple[str, str]:
    """The level that is cheapest in time among those that fit, and why it is this one.

    Args:
        estimate: Of the run.
        free_bytes: That the run may take, with what it has taken already: see :func:`available_bytes`.
        tokens: Of the largest micro-batch.
        levels: To choose from; all, if not given.

    Raises:
        ModelError: None fits.
    """
    levels = estimate.levels if levels is None else levels
    free = f"{free_bytes / 2**30:.2f} GiB, of which {MARGIN:.0%} stay free"
    previous = None
    for level in levels:
        if estimate.fits(level, free_bytes, tokens):
            needed = f"{level} takes {_gib(estimate.total_bytes(level, tokens))} of {free}"
            if previous is None:
                return level, needed
            return level, f"{needed}; {previous} would take {_gib(estimate.total_bytes(previous, tokens))}"
        previous = level
    least = min(estimate.total_bytes(level, tokens) for level in levels)
    raise ModelError(
        f"A micro-batch of {tokens} tokens takes {_gib(least)} at least, and there are {free}. Lower "
        "train.micro_batch_size, data.max_seq_len or lora.rank, or take a smaller base."
    )


def available_bytes(device: torch.device, loaded_bytes: int = 0) -> int:
    """What a run may take of the device at hand, with what it has taken already.

    Args:
        device: At hand.
        loaded_bytes: Of a model that is on it; on CUDA torch knows.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES  # asking has made the context
    return _host_bytes() + loaded_bytes


def _host_bytes() -> int:
    """Memory of the host that is free, or of the container that this runs in."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    values = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def report(estimate: Estimate, free_bytes: int, level: str = "auto") -> dict[str, Any]:
    """All of it, for people and programs.

    Args:
        estimate: Of a run.
        free_bytes: That it may take.
        level: That the config asks for; `auto` for the cheapest in time that fits.

    Returns:
        Values that JSON has. `level` is the one to use, None if it does not fit; `why` says why.

    Raises:
        ModelError: The model can't have the level that is asked for.
    """
    tokens = estimate.tokens
    if level not in ("auto", *estimate.levels):
        raise ModelError(f"model.recompute: {level} can't be had here; it can be {', '.join(estimate.levels)}.")
    levels = {}
    for name in estimate.levels:
        by_kind = estimate.bytes_by_kind(name, tokens)
        levels[name] = {
            "bytes": by_kind,
            "total": sum(by_kind.values()),
            "fits": estimate.fits(name, free_bytes, tokens),
            "largest_micro_batch": estimate.largest_micro_batch(name, free_bytes),
            "longest_context": estimate.longest_context(name, free_bytes),
            "weight_cache_layers": estimate.weight_cache_layers(free_bytes, name, tokens),
        }
    allowed = estimate.levels if level == "auto" else [level]
    chosen, why = None, ""
    try:
        chosen, why = choose_level(estimate, free_bytes, tokens, allowed)
    except ModelError as error:
        why = str(error)
    return {
        "device": str(estimate.device),
        "compute_dtype": str(estimate.dtype).removeprefix("torch."),
        "micro_batch_size": estimate.micro_batch_size,
        "max_seq_len": estimate.max_seq_len,
        "free_bytes": free_bytes,
        "margin": MARGIN,
        "levels": levels,
        "level": chosen,
        "why": why,
    }
