"""Releases of runs: merging with what a run's objective says of it."""

from pathlib import Path

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.export import Judge, MergeReport
from qlora.export import merge as merge_adapter
from qlora.export.companions import OnProgress
from qlora.model import labels_from_config
from qlora.objectives import objective_from_section, release_loss


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

    See :func:`qlora.export.merge` for arguments and errors. `onto="best"` compares by the loss of the run's
    objective, or by :attr:`qlora.objectives.Objective.judge` where a merged model does not have that loss.
    """
    return merge_adapter(
        run_dir, out_dir, dtype, onto, max_shard_size, device, force, on_progress, format, base, judge_of
    )


def judge_of(run: RunDirectory) -> Judge:
    """Return what merges of a run are compared by: the loss of its objective, if a merged model has it by itself."""
    config = load_config(run.config)
    note = None
    if objective_from_section(config.train).loss.has_reference:
        note = (
            "the losses by base are those of the preferred answers' tokens, because the loss of "
            f"{config.train.objective} compares with the model at step 0, which a merged model does not have"
        )
    return Judge(release_loss(config.train, labels_from_config(config, run)), note)
