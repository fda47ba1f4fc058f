"""Where a run starts: at the beginning, or from a checkpoint; and that the directory is its own."""

from pathlib import Path

from qlora.checkpoint import RunDirectory, step_of
from qlora.config import RunConfig, load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.training.assemble import Assembly

# Keys of `train` that a run may be continued with other values of.
FREE_KEYS = {
    "output_dir",
    "epochs",
    "max_steps",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "trackers",
}


# What was in use and may not change within a run: batches and roundings depend on it.
KEPT_IN_USE = ("processes", "compute_dtype", "attention", "activations", "dequantize", "tiled", "rounding")
# Keys of a model that may change within a run, as results don't depend on them; but for tiles, which are in use or not.
FREE_MODEL_KEYS = {"recompute", "weight_cache"}


def find_start(run: RunDirectory, config: RunConfig, resume: str) -> Path | None:
    """The checkpoint to start from, or None for a fresh run.

    Args:
        run: The output directory.
        config: Of the run to be.
        resume: `auto`, `never`, or a checkpoint's path.

    Raises:
        ConfigError: The directory holds another run, or one that `resume` does not allow for.
        CheckpointError: The path holds no checkpoint.
    """
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"train.output_dir: {run.path} is a file; name a folder.")
    checkpoints = run.list_checkpoints()
    if run.exists():
        if resume == "never":
            raise ConfigError(f"{run.path} holds a run already; choose another train.output_dir, or --resume auto.")
        _check_same_run(run, config)
    elif any(path.exists() for path in (run.config, run.adapter, run.checkpoints)):
        raise ConfigError(
            f"train.output_dir: {run.path} has a config.yaml, adapter or checkpoints, but no run.json, so it is no run "
            "and they would be overwritten. Choose another folder."
        )
    if resume in ("auto", "never"):
        return checkpoints[-1] if checkpoints else None

    path = Path(resume).expanduser()
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume}: there is no checkpoint there.")
    step = step_of(path) or 0
    newer = [other.name for other in checkpoints if (step_of(other) or 0) > step]
    if newer:
        raise ConfigError(
            f"{run.path} holds checkpoints newer than {path.name} ({', '.join(newer)}); to start from an older one, "
            "choose another train.output_dir."
        )
    return path


def check_same_inputs(run: RunDirectory, assembly: Assembly) -> None:
    """Sees that base, data and what `auto` became are still those that the run began with.

    Raises:
        ConfigError: They are not, so the steps to come would not be those of one run.
    """
    record = run.read_record()
    changes = [f"{assembly.files.name}: {name}" for name in assembly.files.differing(record["base"]["files"])]
    for before, now in zip(record["data"], assembly.plan.datasets.reports, strict=True):
        if before.get("digest") != now.digest:
            changes.append(f"{now.source}: what is learnt from it")
    changes += [
        f"{key}: {record['in_use'].get(key)} before, {assembly.plan.in_use[key]} now"
        for key in KEPT_IN_USE
        if record["in_use"].get(key) != assembly.plan.in_use[key]
    ]
    if changes:
        raise ConfigError(
            f"{run.path} was begun otherwise; choose another train.output_dir, or undo what has changed (tiles follow "
            "from model.recompute):\n" + "\n".join(f"  {change}" for change in changes)
        )


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether this very config was trained to its end here already."""
    return run.exists() and run.read_record()["status"] == "finished" and load_config(run.config) == config


def _check_same_run(run: RunDirectory, config: RunConfig) -> None:
    before, now = (_identity(each) for each in (load_config(run.config), config))
    differing = [f"  {key}: {before[key]!r} there, {now[key]!r} here" for key in now if before[key] != now[key]]
    if differing:
        raise ConfigError(
            f"{run.path} holds a run with other settings; choose another train.output_dir, or undo:\n"
            + "\n".join(differing)
        )


def _identity(config: RunConfig) -> dict[str, object]:
    """What makes two runs the same one, by dotted key."""
    sections = config.model_dump(
        exclude={"export": True, "train": FREE_KEYS, "data": {"cache_dir"}, "model": FREE_MODEL_KEYS}
    )
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
