"""Where a run starts: at the beginning, or from a checkpoint; and that the directory is its own."""

from pathlib import Path

from qlora.checkpoint import RunDirectory
from qlora.config import RunConfig, load_config
from qlora.errors import CheckpointError, ConfigError

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
    if resume in ("auto", "never"):
        return checkpoints[-1] if checkpoints else None

    path = Path(resume)
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume}: there is no checkpoint there.")
    newer = [other.name for other in checkpoints if other.name > path.name]
    if newer:
        raise ConfigError(
            f"{run.path} holds checkpoints newer than {path.name} ({', '.join(newer)}); to start from an older one, "
            "choose another train.output_dir."
        )
    return path


def check_same_inputs(run: RunDirectory, base: dict[str, str], data: list[dict[str, object]]) -> None:
    """Sees that base and data are still those that the run began with.

    Raises:
        ConfigError: A file of the base, or what the data came to, has changed.
    """
    record = run.read_record()
    before = record["base"]["files"]
    differing = sorted(name for name in {*before, *base} if before.get(name) != base.get(name))
    if differing:
        raise ConfigError(f"{run.path} was begun with other files of the base: {', '.join(differing)} have changed.")
    if record["data"] != data:
        sources = [now["source"] for then, now in zip(record["data"], data, strict=True) if then != now]
        raise ConfigError(f"{run.path} was begun with other data: {', '.join(map(str, sources))} have changed.")


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
    sections = config.model_dump(exclude={"export": True, "train": FREE_KEYS})
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
