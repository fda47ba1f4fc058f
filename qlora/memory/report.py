"""A prediction of a run's memory as a report: what fits a device at each level of recomputation."""

from dataclasses import asdict, dataclass
from typing import Any

from qlora.errors import ModelError
from qlora.memory.estimate import MARGIN, Estimate, choose_level


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
    unpacked_why: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<MemoryReport: recompute {self.level}: {self.why}>" if self.level else f"<MemoryReport: {self.why}>"


def make_report(estimate: Estimate, free_bytes: int, level: str = "auto") -> MemoryReport:
    """Compare a prediction with the free memory.

    Args:
        estimate: The prediction.
        free_bytes: Bytes that the run may take.
        level: Level of recomputation that the config asks for; `auto` for the fastest one that fits.

    Raises:
        ModelError: The model does not support the level.
    """
    tokens = estimate.tokens
    if level not in ("auto", *estimate.levels):
        raise ModelError(f"model.recompute: {level} is not available; set {' or '.join(estimate.levels)}.")
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
        unpacked_why=estimate.footprint.unpacked_why,
    )
