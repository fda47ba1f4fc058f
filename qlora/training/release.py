"""Releases of runs: merging with what a run's objective says of it."""

from pathlib import Path

from qlora.config import RunConfig
from qlora.export import Judge, MergeReport
from qlora.export import merge as merge_adapter
from qlora.export.companions import OnProgress
from qlora.objectives import objective_from_section


def merge(
    run_dir: str | Path,
    out_dir: str | Path,
    dtype: str = "float16",
    onto: str | None = None,
    max_shard_size: str | None = None,
    device: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    format: str = "safetensors",
    base: str | None = None,
) -> MergeReport:
    """Merge an adapter into its base, and write weights that need neither qlora nor PEFT.

    See :func:`qlora.export.merge` for arguments and errors. `onto="best"` compares by the loss of the run's objective.
    """
    return merge_adapter(
        run_dir, out_dir, dtype, onto, max_shard_size, device, force, on_progress, format, base, judge_of
    )


def judge_of(config: RunConfig) -> Judge:
    """Return what merges of a config's run are compared by."""
    return Judge(objective_from_section(config.train).loss)
