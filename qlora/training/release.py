"""Releases of runs: merging with what a run's objective says of it."""

from pathlib import Path

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.export import Judge, MergeReport
from qlora.export import merge as merge_adapter
from qlora.export.companions import OnProgress
from qlora.model import labels_from_config
from qlora.objectives import evaluation_loss, objective_from_section


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
    judge = objective_from_section(config.train).judge
    if judge is None:
        return Judge(evaluation_loss(config.train, labels_from_config(config, run)))
    return Judge(
        judge,
        f"the losses by base are those of the preferred answers' tokens, because the loss of {config.train.objective} "
        "compares with the model at step 0, which a merged model does not have",
    )
