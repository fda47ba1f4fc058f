"""Where a run starts: at the beginning or at a checkpoint, and whether directory and checkpoint belong to it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora.about import __version__
from qlora.checkpoint import RunDirectory, RunRecord, check_whole, newest_whole, read_origin, step_of
from qlora.config import RunConfig, load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.training.schedule import rate_of

# Keys that a run may be continued with other values of: its steps don't depend on them. (With tiles they do, but a
# change of those shows in what is in use.)
FREE_KEYS = {
    "train.output_dir", "train.epochs", "train.max_steps", "train.log_every", "train.eval_every", "train.save_every",
    "train.keep_checkpoints", "train.trackers", "train.on_nonfinite", "data.cache_dir", "model.recompute",
    "model.weight_cache", "export.dtype", "export.onto", "export.max_shard_size",
}  # fmt: skip
# Keys that more steps may be added with other values of: the learning rate changes with the number of steps anyway.
SCHEDULE_KEYS = {"train.learning_rate", "train.min_learning_rate", "train.lr_scheduler", "train.warmup_ratio"}
# How long a run is.
LENGTH_KEYS = {"train.epochs", "train.max_steps"}
# Where files are on one machine, and what only the first process does.
OWN_KEYS = {"train.output_dir", "train.trackers", "data.cache_dir"}
# What was in use and may not change within a run: batches and roundings depend on it.
KEPT_IN_USE = ("processes", "compute_dtype", "attention", "activations", "dequantize", "tiled", "rounding")
WAYS_OUT = "start over with --fresh, which keeps the old run under another name, or choose another train.output_dir."


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts, as the first process sees it.

    Attributes:
        checkpoint: To continue from, or None for step 0.
        origins: What directory and checkpoint followed from, see :func:`describe_origin`, by their paths.
        damaged: Newer checkpoints that are skipped, and what is wrong with each.
        fresh: Whether a run in the directory is moved aside first.
        is_done: Whether the directory's run is finished, and the config asks for no other number of steps.
        config: Config of the earlier sessions: of the directory's run, or else of the checkpoint's.
        record: Record of the same; None if there is none.
        started_from: Checkpoint of another run that the directory's run began at, if it did.
        final_step: Step of the adapter that the directory's run left at its end, if it had one.
    """

    checkpoint: Path | None = None
    origins: dict[Path, dict[str, Any]] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)
    fresh: bool = False
    is_done: bool = False
    config: RunConfig | None = None
    record: RunRecord | None = None
    started_from: str | None = None
    final_step: int | None = None

    @property
    def finished_steps(self) -> int | None:
        """Steps of the earlier sessions' run, if it is finished."""
        return self.record.steps if self.record is not None and self.record.is_finished else None

    def describe_damage(self) -> list[str]:
        """A line for each checkpoint that is skipped."""
        start = self.checkpoint and self.checkpoint.name
        return [f"{path.name} is skipped, and {start} continued: {problem}" for path, problem in self.damaged.items()]

    def changes(self, config: RunConfig, keys: Iterable[str]) -> list[str]:
        """Differences of a config from that of the earlier sessions, among some keys."""
        if self.config is None:
            return []
        before, now = flatten(self.config), flatten(config)
        return describe_changes({key: before[key] for key in keys}, {key: now[key] for key in keys})

    def describe_jump(self, config: RunConfig, step: int, total_steps: int) -> list[str]:
        """A line if the learning rate does not go on as it would have in the earlier sessions."""
        if self.config is None or self.record is None or not 0 < step < total_steps:
            return []
        length_before = self.record.total_steps
        earlier, now = rate_of(self.config.train, length_before), rate_of(config.train, total_steps)
        expected = earlier(min(step, length_before - 1))
        if abs(now(step) - expected) <= 0.01 * expected:
            return []
        reason = f", because the schedule now spans {total_steps} steps instead of {length_before}"
        return [
            f"The learning rate jumps from {earlier(step - 1):.3g} at step {step} to {now(step):.3g} at step "
            f"{step + 1}{reason if total_steps != length_before else ''}. To extend a finished run at a steady rate, "
            "set train.lr_scheduler=constant with the train.learning_rate of your choice. A run that will be extended "
            "is best trained with lr_scheduler constant, or with a floor (train.min_learning_rate), from its start."
        ]


def find_start(run: RunDirectory, config: RunConfig, resume: str, fresh: bool = False) -> Start:
    """Find the newest whole checkpoint, or the one that is asked for.

    Args:
        run: The output directory, see :func:`check_folder`.
        config: Of the run to be.
        resume: `auto`, or the path of a checkpoint or run.
        fresh: Start at step 0, even if the directory holds a run.

    Raises:
        ConfigError: The directory holds another run, or a finished one without a checkpoint to continue from, or the
            arguments contradict each other.
        CheckpointError: The path holds no whole checkpoint, or none of the run's is whole.
    """
    if resume == "never":
        raise ConfigError("--resume never was replaced by --fresh, which keeps the old directory under another name.")
    if fresh and resume != "auto":
        raise ConfigError(f"--fresh and --resume {resume} can't be combined.")
    if not run.exists() and any(path.exists() for path in (run.config, run.adapter, run.checkpoints)):
        raise ConfigError(
            f"train.output_dir: {run.path} has a config.yaml, adapter or checkpoints, but no run.json, so it is not a "
            "run and they would be overwritten. Choose another folder."
        )
    if fresh:
        return Start(fresh=True)
    named = None if resume == "auto" else _named(resume)
    if not run.exists():
        return Start() if named is None else _at_foreign_checkpoint(named, config)

    before, record = load_config(run.config), run.read_record()
    start = Start(
        origins={run.path: describe_origin(before, record)},
        config=before,
        record=record,
        started_from=record.started_from,
        final_step=run.final_step,
    )
    is_finished = start.finished_steps is not None and run.adapter.is_dir()
    is_extended = is_finished and bool(start.changes(config, LENGTH_KEYS))
    _check_same_settings(run.path, start.origins[run.path], config, SCHEDULE_KEYS if is_extended else set(), WAYS_OUT)
    if is_finished and not is_extended:
        return replace(start, is_done=True)
    if named is None or str(named) == start.started_from:
        checkpoint, damaged = newest_whole(run.list_checkpoints())
    else:
        checkpoint, damaged = named, {}
        _check_newest(run, named)
    if damaged and checkpoint is None:
        raise CheckpointError(
            f"No checkpoint of {run.path} is whole. Start over with --fresh, which keeps them:\n"
            + "\n".join(f"  {problem}" for problem in damaged.values())
        )
    if checkpoint is None and run.adapter.is_dir():
        raise ConfigError(
            f"{run.path} holds the adapter of a finished run, but no checkpoint to continue from. Start over with "
            "--fresh, which keeps it, or choose another train.output_dir."
        )
    if checkpoint is None:
        return start if named is None else replace(_at_foreign_checkpoint(named, config), origins=start.origins)
    # A run that was extended keeps checkpoints of its old schedule; its config, checked above, has the new one.
    is_own = checkpoint.parent == run.checkpoints
    origin = _read_origin(checkpoint, config, SCHEDULE_KEYS if is_own else set(), WAYS_OUT)
    return replace(start, damaged=damaged, checkpoint=checkpoint, origins=start.origins | {checkpoint: origin})


def check_folder(run: RunDirectory) -> None:
    """Check that output_dir can be used for a run.

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


def flatten(config: RunConfig) -> dict[str, Any]:
    """The config by dotted key, as plain JSON values.

    Of the paths of base and data only the last part is kept: these are identified by what they hold, and may be moved.
    """
    sections = config.model_dump(mode="json")
    sections["model"]["base"] = Path(config.model.base).name
    for sources in (sections["data"]["train"], sections["data"]["eval"]):
        for source in sources if isinstance(sources, list) else ():
            source["path"] = Path(source["path"]).name
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line `key: old → new` for each value that differs."""
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    before_of, now_of = (_by_source({key: values.get(key) for key in changed}) for values in (before, now))
    return [
        f"{key}: {_shown(before_of.get(key))} → {_shown(now_of.get(key))}"
        for key in before_of | now_of
        if before_of.get(key) != now_of.get(key)
    ]


def _by_source(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with those of lists of sources under a key each: `data.train[0].path`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            found |= {f"{key}[{place}].{name}": each[name] for place, each in enumerate(value) for name in each}
        else:
            found[key] = value
    return found


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def describe_origin(config: RunConfig, record: RunRecord) -> dict[str, Any]:
    """Everything that determines the steps of a run, as JSON values: settings, base, data, and what `auto` became.

    Args:
        config: Of the run.
        record: As in run.json.
    """
    origin = {
        "settings": {key: value for key, value in flatten(config).items() if key not in FREE_KEYS},
        "base": record.base.files,
        "data": [[report["source"], report["digest"]] for report in record.data],
        "examples": asdict(record.examples),
        "in_use": {key: getattr(record.in_use, key) for key in KEPT_IN_USE},
    }
    return json.loads(json.dumps(origin))  # as it is read back


def compare_origins(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each difference between two origins, settings aside."""
    files, other_files = before["base"], now["base"]
    changes = [
        f"model.base: {name} has other contents"
        for name in sorted({*files, *other_files})
        if files.get(name) != other_files.get(name)
    ]
    digests = [digest for _, digest in before["data"]]
    changes += [
        f"{source}: what is learned from it"
        for index, (source, digest) in enumerate(now["data"])
        if digests[index : index + 1] != [digest]
    ]
    if len(digests) > len(now["data"]):
        changes.append(f"number of data sources: {len(digests)} → {len(now['data'])}")
    if before.get("examples") not in (None, now["examples"]):  # a checkpoint of qlora 0.1.0 does not say how many
        changes.append(f"number of examples: {_shown(before['examples'])} → {_shown(now['examples'])}")
    return changes + describe_changes(before["in_use"], now["in_use"])


def check_same_origin(start: Start, now: dict[str, Any]) -> None:
    """Check that base, data and what `auto` became are still those that the run began with.

    Raises:
        ConfigError: They are not, so the steps to come would not be those of one run.
    """
    for place, before in start.origins.items():
        if changes := compare_origins(before, now):
            version = __version__ if start.record is None else start.record.versions.get("qlora", __version__)
            hint = " (tiles follow from model.recompute)" if any(line.startswith("tiled:") for line in changes) else ""
            raise ConfigError(
                f"{place} was trained with a different base, data or setup{hint}:\n"
                + "\n".join(f"  {change}" for change in changes)
                + (f"\n  qlora: {version} → {__version__}" if version != __version__ else "")
                + f"\nUndo these changes, {WAYS_OUT}"
            )


def _at_foreign_checkpoint(checkpoint: Path, config: RunConfig) -> Start:
    """Start from a checkpoint of another run, whose config and record are read if it still lies in that run."""
    other = RunDirectory.find(checkpoint)
    record = None if other is None else other.read_record()
    # qlora 0.1.0 wrote the number of examples into the record alone.
    examples = None if record is None else asdict(record.examples)
    origin = {"examples": examples} | _read_origin(checkpoint, config, set(), "or leave out --resume.")
    return Start(
        checkpoint=checkpoint,
        origins={checkpoint: origin},
        config=None if other is None else load_config(other.config),
        record=record,
        started_from=str(checkpoint),
    )


def _named(resume: str) -> Path:
    """The checkpoint that a path names: itself, or the last one of a run."""
    run = RunDirectory.find(resume)
    path: Path | None = Path(resume).expanduser() if run is None else run.adapter
    if run is not None and path == run.final_adapter:
        path, _ = newest_whole(run.list_checkpoints())
    if path is None or not (path / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume}: there is no checkpoint or run there.")
    check_whole(path)
    return path.absolute()


def _check_newest(run: RunDirectory, checkpoint: Path) -> None:
    step = step_of(checkpoint) or 0
    newer = [each.name for each in run.list_checkpoints() if (step_of(each) or 0) > step]
    if newer:
        raise ConfigError(
            f"{run.path} has newer checkpoints ({', '.join(newer)}). To start from {checkpoint.name}, choose another "
            "train.output_dir."
        )


def _read_origin(checkpoint: Path, config: RunConfig, may_change: set[str], ways_out: str) -> dict[str, Any]:
    """What a checkpoint followed from, checked to be of the config's settings."""
    origin = read_origin(checkpoint)
    data = origin.get("data")
    if not all(isinstance(origin.get(key), dict) for key in ("settings", "base", "in_use")) or not (
        isinstance(data, list) and all(isinstance(source, list) and len(source) == 2 for source in data)
    ):
        raise CheckpointError(f"{checkpoint} does not say what it followed from; it was not written by qlora train.")
    _check_same_settings(checkpoint, origin, config, may_change, ways_out)
    return origin


def _check_same_settings(
    place: Path, origin: dict[str, Any], config: RunConfig, may_change: set[str], ways_out: str
) -> None:
    settings = {key: value for key, value in flatten(config).items() if key not in FREE_KEYS | may_change}
    changes = describe_changes(_with_defaults(origin["settings"]), settings)
    if changes:
        raise ConfigError(
            f"{place} was trained with other settings:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nUndo these changes, {ways_out}"
        )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, with the defaults of keys that its version of qlora did not have."""
    least = {"model": {"base": "."}, "data": {"train": "."}, "train": {"output_dir": "."}}
    defaults = flatten(RunConfig.model_validate(least))
    completed, source = defaults | settings, defaults["data.train"][0]
    for key in ("data.train", "data.eval"):
        if isinstance(completed[key], list):
            completed[key] = [source | each if isinstance(each, dict) else each for each in completed[key]]
    return completed
