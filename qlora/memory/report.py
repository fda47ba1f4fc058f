"""A prediction of a run's memory as a report: what fits a device at each level of recomputation."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora.errors import ModelError
from qlora.memory.cards import Card
from qlora.memory.estimate import MARGIN, Estimate, choose_level
from qlora.memory.pace import pace_of
from qlora.memory.place import first_that_fits, places_of


@dataclass(frozen=True, slots=True, repr=False)
class MemoryReport:
    """Peak memory of a run, and what fits.

    Attributes:
        device: Device of the run.
        compute_dtype: Compute dtype.
        micro_batch_size: Number of sequences per micro-batch.
        max_seq_len: Largest number of tokens per sequence; 1 for images.
        of_images: Whether the sequences are images.
        free_bytes: Bytes that the run may take.
        margin: Share of these bytes that stays free.
        levels: For each level of recomputation, the fastest first: `bytes` by kind, `total`, whether it `fits`, the
            `largest_micro_batch`, the `longest_context` and the number of `weight_cache_layers`.
        level: The level to use; None if the run does not fit.
        why: Reason for the level, or why no level fits.
        weights: Where the 4-bit weights of the layers would be; `levels` are for that place.
        weights_why: Reason for it.
        processes: Number of processes, each with a GPU of this size.
        host_free_bytes: Bytes of host memory that each process may take besides its device; None for another machine.
        places: For each place, the fastest first: the `level` that fits or else takes least, its `total` bytes on the
            device, whether it `fits` device and host, `host_bytes` and `copied_bytes` per process, the latter in an
            optimizer step; and for a GPU that is named, `compute_seconds` and `copy_seconds` of an optimizer step on
            paper and the number of tokens of a micro-batch from which the copies take no extra time, `hidden_from`.
        unpacked_why: Why documents would not be packed, as far as the architecture tells; None if it does not.
    """

    device: str
    compute_dtype: str
    micro_batch_size: int
    max_seq_len: int
    of_images: bool
    free_bytes: int
    margin: float
    levels: dict[str, dict[str, Any]]
    level: str | None
    why: str
    weights: str
    weights_why: str
    processes: int
    host_free_bytes: int | None
    places: dict[str, dict[str, Any]]
    unpacked_why: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<MemoryReport: recompute {self.level}: {self.why}>" if self.level else f"<MemoryReport: {self.why}>"


def make_report(
    estimate: Estimate,
    free_bytes: int,
    level: str = "auto",
    weights: str = "auto",
    micro_batches: int = 1,
    card: Card | None = None,
) -> MemoryReport:
    """Compare a prediction with the free memory.

    Args:
        estimate: The prediction, with its number of processes and the free memory of the host.
        free_bytes: Bytes that the run may take on each device.
        level: Level of recomputation that the config asks for; `auto` for the fastest one that fits.
        weights: Where the config asks the weights to be; `auto` for the first place that fits.
        micro_batches: Number of micro-batches of an optimizer step on each process.
        card: GPU whose times are computed; None for none.

    Raises:
        ModelError: The model does not support the level.
    """
    if level not in ("auto", *estimate.levels):
        raise ModelError(f"model.recompute: {level} is not available; set {' or '.join(estimate.levels)}.")
    weights_why = "set by model.weights"
    if weights == "auto":
        weights, weights_why = first_that_fits(estimate, free_bytes, level=level)
    places = {}
    for place in places_of(estimate):
        places[place] = _describe_place(replace(estimate, weights=place), free_bytes, level, micro_batches, card)
    estimate = replace(estimate, weights=weights)
    tokens = estimate.tokens
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
    chosen: str | None = None
    try:
        chosen, why = choose_level(estimate, free_bytes, tokens, estimate.levels if level == "auto" else [level])
    except ModelError as error:
        why = str(error)
    return MemoryReport(
        device=str(estimate.device),
        compute_dtype=str(estimate.dtype).removeprefix("torch."),
        micro_batch_size=estimate.micro_batch_size,
        max_seq_len=estimate.max_seq_len,
        of_images=estimate.of_images,
        free_bytes=free_bytes,
        margin=MARGIN,
        levels=levels,
        level=chosen,
        why=why,
        weights=weights,
        weights_why=weights_why,
        processes=estimate.processes,
        host_free_bytes=estimate.host_free,
        places=places,
        unpacked_why=estimate.footprint.unpacked_why,
    )


def _describe_place(
    estimate: Estimate, free_bytes: int, level: str, micro_batches: int, card: Card | None
) -> dict[str, Any]:
    """Return what :attr:`MemoryReport.places` has about the place of an estimate."""
    levels = estimate.levels if level == "auto" else [level]
    totals = {name: estimate.total_bytes(name, estimate.tokens) for name in levels}
    fitting = [name for name in levels if estimate.fits(name, free_bytes, estimate.tokens)]
    chosen = fitting[0] if fitting else min(totals, key=lambda name: totals[name])
    placed = estimate.placed
    found = {
        "level": chosen,
        "total": totals[chosen],
        "fits": bool(fitting),
        "host_bytes": estimate.host_bytes(chosen, estimate.tokens),
        "copied_bytes": placed.copied * micro_batches,
    }
    if card is not None:
        pace = pace_of(estimate, chosen, card)
        found |= {
            "compute_seconds": pace.compute * micro_batches,
            "copy_seconds": pace.copy * micro_batches,
            "hidden_from": pace.hidden_from,
        }
    return found
