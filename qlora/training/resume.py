"""Where a run starts: at the beginning, or from a checkpoint; and that the directory is its own."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.checkpoint import RunDirectory, check_whole, newest_whole, read_origin, step_of
from qlora.config import RunConfig, SourceSection, load_config
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
    "on_nonfinite",
}
# What was in use and may not change within a run: batches and roundings depend on it.
KEPT_IN_USE = ("processes", "compute_dtype", "attention", "activations", "dequantize", "tiled", "rounding")
# Keys of a model that may change within a run, as results don't depend on them; but for tiles, which are in use or not.
FREE_MODEL_KEYS = {"recompute", "weight_cache"}
# Settings that are lists of sources, or may be.
SOURCE_KEYS = ("data.train", "data.eval")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: To continue from, or None for the beginning.
        origins: What run and checkpoint followed from, see :func:`describe_origin`, by who tells.
        damaged: Newer checkpoints that are passed over, and what is wrong with each.
    """

    checkpoint: Path | None
    origins: dict[Path, dict[str, Any]] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)

    def describe_damage(self) -> list[str]:
        """A line for each checkpoint that is passed over."""
        start = self.checkpoint and self.checkpoint.name
        return [f"{path.name} is passed over, and {start} continued: {what}" for path, what in self.damaged.items()]


def find_start(run: RunDirectory, config: RunConfig, resume: str) -> Start:
    """Finds the newest whole checkpoint, or the one that is asked for.

    Args:
        run: The output directory.
        config: Of the run to be.
        resume: `auto`, `never`, or a checkpoint's path.

    Raises:
        ConfigError: The directory holds another run, one that `resume` does not allow for, or a finished one that can't
            be continued.
        CheckpointError: The path holds no whole checkpoint, or none of the run's is whole.
    """
    check_folder(run)
    origins = {}
    if run.exists():
        if resume == "never":
            raise ConfigError(f"{run.path} holds a run already; choose another train.output_dir, or --resume auto.")
        origins[run.path] = describe_origin(load_config(run.config), run.read_record())
    elif any(path.exists() for path in (run.config, run.adapter, run.checkpoints)):
        raise ConfigError(
            f"train.output_dir: {run.path} has a config.yaml, adapter or checkpoints, but no run.json, so it is no run "
            "and they would be overwritten. Choose another folder."
        )
    checkpoints = run.list_checkpoints()
    if resume in ("auto", "never"):
        checkpoint, damaged = newest_whole(checkpoints)
        if damaged and checkpoint is None:
            raise CheckpointError(
                f"No checkpoint of {run.path} is whole; remove {run.checkpoints} to begin anew:\n"
                + "\n".join(f"  {what}" for what in damaged.values())
            )
    else:
        checkpoint, damaged = _named(run, resume, checkpoints), {}
    if checkpoint is None and run.exists() and run.adapter.is_dir() and not is_finished(run, config):
        raise ConfigError(
            f"{run.path} holds the adapter of a finished run, and no checkpoint to continue: it would be trained anew, "
            "and replaced. Choose another train.output_dir."
        )
    if checkpoint is not None:
        origins[checkpoint] = _checked(checkpoint, read_origin(checkpoint))
    for place, origin in origins.items():
        _check_same_settings(place, origin, config)
    return Start(checkpoint, origins, damaged)


def check_folder(run: RunDirectory) -> None:
    """Sees that a run can have its directory.

    Raises:
        ConfigError: It or one of its folders is a file, or it holds a link to one, which would be written to wherever
            it is.
    """
    for folder in (run.path, run.adapter, run.checkpoints):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"train.output_dir: {folder} is a file, and should be a folder.")
    for path in run.path.glob("*"):
        if path.is_symlink() and not path.is_dir():
            raise ConfigError(f"train.output_dir: {path} is a link to {path.readlink()}; put the file itself there.")


def describe_origin(config: RunConfig, record: dict[str, Any]) -> dict[str, Any]:
    """What the steps of a run follow from, as plain values: its settings, base and data, and what `auto` became.

    Args:
        config: Of the run.
        record: As in run.json.
    """
    origin = {
        "settings": _identity(config),
        "base": record["base"]["files"],
        "data": [[report["source"], report["digest"]] for report in record["data"]],
        "examples": record.get("examples"),
        "in_use": {key: record["in_use"].get(key) for key in KEPT_IN_USE},
    }
    return json.loads(json.dumps(origin))  # as it is read back


def check_same_origin(start: Start, config: RunConfig, record: dict[str, Any]) -> None:
    """Sees that base, data and what `auto` became are still those that the run began with.

    Raises:
        ConfigError: They are not, so the steps to come would not be those of one run.
    """
    now = describe_origin(config, record)
    for place, before in start.origins.items():
        changes = [
            f"{record['base']['name']}: {name}"
            for name in sorted({*before["base"], *now["base"]})
            if before["base"].get(name) != now["base"].get(name)
        ]
        digests = [digest for _, digest in before["data"]]
        changes += [
            f"{source}: what is learnt from it"
            for index, (source, digest) in enumerate(now["data"])
            if digests[index : index + 1] != [digest]
        ]
        changes += [
            f"{key}: {before['in_use'].get(key)} before, {value} now"
            for key, value in now["in_use"].items()
            if before["in_use"].get(key) != value
        ]
        # A checkpoint of an earlier version does not say how many there were.
        if before.get("examples") not in (None, now["examples"]):
            changes.append(f"examples chosen from the data: {before['examples']} before, {now['examples']} now")
        if changes:
            raise ConfigError(
                f"{place} was begun otherwise; choose another train.output_dir, or undo what has changed (tiles follow "
                "from model.recompute):\n" + "\n".join(f"  {change}" for change in changes)
            )


def is_finished(run: RunDirectory, config: RunConfig) -> bool:
    """Whether this very config was trained to its end here already."""
    if not run.exists() or run.read_record()["status"] != "finished":
        return False
    return run.adapter.is_dir() and load_config(run.config) == config


def _named(run: RunDirectory, resume: str, checkpoints: list[Path]) -> Path:
    path = Path(resume).expanduser()
    if not (path / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume}: there is no checkpoint there.")
    check_whole(path)
    step = step_of(path) or 0
    newer = [other.name for other in checkpoints if (step_of(other) or 0) > step]
    if newer:
        raise ConfigError(
            f"{run.path} holds checkpoints newer than {path.name} ({', '.join(newer)}); to start from an older one, "
            "choose another train.output_dir."
        )
    return path


def _checked(checkpoint: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says that it followed from, if it can be that."""
    data = origin.get("data")
    if not all(isinstance(origin.get(key), dict) for key in ("settings", "base", "in_use")) or not (
        isinstance(data, list) and all(isinstance(source, list) and len(source) == 2 for source in data)
    ):
        raise CheckpointError(f"{checkpoint} does not say what it followed from; it was not written by qlora train.")
    return origin


def _check_same_settings(place: Path, origin: dict[str, Any], config: RunConfig) -> None:
    before, now = _completed(origin["settings"]), json.loads(json.dumps(_identity(config)))
    differing = [f"  {key}: {before.get(key)!r} there, {now[key]!r} here" for key in now if before.get(key) != now[key]]
    if differing:
        raise ConfigError(
            f"{place} holds a run with other settings; choose another train.output_dir, or undo:\n"
            + "\n".join(differing)
        )


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of keys that the version of qlora that wrote the settings did not know."""
    defaults = RunConfig.model_validate({"model": {"base": "-"}, "data": {"train": "-"}, "train": {"output_dir": "-"}})
    settings = json.loads(json.dumps(_identity(defaults))) | settings
    source_defaults = SourceSection(path="-").model_dump(mode="json")
    for key in SOURCE_KEYS:
        if isinstance(settings[key], list):
            settings[key] = [source_defaults | source for source in settings[key] if isinstance(source, dict)]
    return settings


def _identity(config: RunConfig) -> dict[str, object]:
    """What makes two runs the same one, by dotted key.

    Of paths only the last part: base and data are told apart by what they hold, and may be moved.
    """
    sections = config.model_dump(
        mode="json", exclude={"export": True, "train": FREE_KEYS, "data": {"cache_dir"}, "model": FREE_MODEL_KEYS}
    )
    sections["model"]["base"] = Path(config.model.base).name
    for sources in (sections["data"]["train"], sections["data"]["eval"]):
        for source in sources if isinstance(sources, list) else ():
            source["path"] = Path(source["path"]).name
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
