"""Everything that determines a run's steps, and how it differs from another session or checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.checkpoint import RunRecord, read_origin, step_of
from qlora.config import RunConfig
from qlora.errors import CheckpointError, ConfigError

# Keys that may change within a run, because its steps don't depend on them. (Tiles depend on model.recompute, but they
# are compared in KEPT_IN_USE.)
FREE_KEYS = {
    "train.output_dir", "train.epochs", "train.max_steps", "train.log_every", "train.eval_every", "train.save_every",
    "train.keep_checkpoints", "train.keep_best", "train.early_stopping", "train.best_mode",
    "train.samples", "train.trackers", "train.on_nonfinite", "data.cache_dir", "data.retain",
    "eval.metrics", "eval.rows", "eval.max_new_tokens",
    "model.recompute", "model.weights", "model.weight_cache", "model.allow_unquantized",
    "export.dtype", "export.onto", "export.max_shard_size",
}  # fmt: skip
# Keys that may change when steps are added, because the learning rate depends on the number of steps anyway.
SCHEDULE_KEYS = {
    "train.learning_rate", "train.min_learning_rate", "train.lr_scheduler", "train.decay_ratio", "train.restarts",
    "train.warmup_steps", "train.warmup_ratio",
}  # fmt: skip
# The key that may change together with the number of processes: see :func:`micro_batches_of_step`.
ACCUMULATION = "train.gradient_accumulation_steps"
# Its name in messages.
STEP_SIZE = "micro-batches of a step, over all processes"
# Keys of the length of a run.
LENGTH_KEYS = {"train.epochs", "train.max_steps", "train.early_stopping"}
# Keys of files on one machine, and of work that only the first process does: they may differ between processes.
OWN_KEYS = {"train.output_dir", "train.trackers", "data.cache_dir"}
# Fields of `InUse` that must not change, because batches and rounding depend on them: see :func:`fixed_in_use`.
KEPT_IN_USE = (
    "processes", "compute_dtype", "attention", "states", "unpacked_why", "activations", "dequantize", "experts",
    "tiled", "rounding", "micro_batches", "loss",
)  # fmt: skip
# Those whose text has a reason after a colon, in this version or an earlier one. It may name what else the process has
# computed, or a temporary file.
WITH_REASON = ("attention", "activations", "dequantize", "experts")


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return the config by dotted key, as JSON values.

    Only the last part of the paths of base and data is kept: they are identified by their contents, and may be moved.
    """
    named = config.data.each_source(lambda source: source.model_copy(update={"path": Path(source.path).name}))
    sections = config.model_copy(update={"data": named}).model_dump(mode="json")
    sections["data"]["packing"] = config.data.packs  # what became of `auto` is in use
    sections["model"]["base"] = Path(config.model.base).name
    if config.lora.start_from is not None:
        sections["lora"]["start_from"] = _adapter_name(Path(config.lora.start_from))
    if config.train.keep is not None and config.train.keep.null_space is not None:
        sections["train"]["keep"]["null_space"] = Path(config.train.keep.null_space).name
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _adapter_name(path: Path) -> str:
    """Return the last part of an adapter's path that names it, with those after it: a run's folders are all alike."""
    parts = path.parts
    is_alike = [part in ("adapter", "checkpoints") or step_of(Path(part)) is not None for part in parts]
    first = max((place for place, alike in enumerate(is_alike) if not alike), default=0)
    return "/".join(parts[first:])


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line `key: old → new` for each value that differs."""
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    before_of, now_of = (_by_source({key: values.get(key) for key in changed}) for values in (before, now))
    return [
        f"{key}: {_shown(before_of.get(key))} → {_shown(now_of.get(key))}"
        for key in before_of | now_of
        if before_of.get(key) != now_of.get(key)
    ]


def _by_source(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with a key for each value of a list of sources, such as `data.train[0].path`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            found |= {f"{key}[{place}].{name}": each[name] for place, each in enumerate(value) for name in each}
        elif key == "data.eval" and isinstance(value, dict):  # several sets
            found |= _by_source({f"{key}.{name}": held for name, held in value.items()})
        else:
            found[key] = value
    return found


def _shown(value: Any) -> str:
    """Return a value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def describe_origin(config: RunConfig, record: RunRecord) -> dict[str, Any]:
    """Return everything that determines a run's steps: settings, base, data, and what is in use, as JSON values."""
    origin = {
        "settings": {key: value for key, value in flatten(config).items() if key not in FREE_KEYS},
        "base": record.base.files,
        "data": [[report["source"], report["digest"]] for report in record.data],
        "examples": asdict(record.examples),
        "in_use": {key: getattr(record.in_use, key) for key in KEPT_IN_USE},
    }
    return json.loads(json.dumps(origin))  # with the types that reading it from a file returns


def micro_batches_of_step(origin: Mapping[str, Any]) -> int | None:
    """Return the number of micro-batches of a step over all processes; None if an origin does not say.

    With the same number, any number of processes takes the same rows in a step. Earlier versions did not record it. It
    can't be computed from the config's key where a session was killed after it wrote its record, and before its config.
    """
    recorded = origin["in_use"].get("micro_batches")
    if type(recorded) is int:
        return recorded
    processes, accumulation = origin["in_use"].get("processes"), origin.get("settings", {}).get(ACCUMULATION)
    return processes * accumulation if type(processes) is int and type(accumulation) is int else None


def fixed_in_use(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is in use in an origin and must not change, without reasons, which may name sizes or paths."""
    in_use = dict(origin["in_use"])
    for key in ("processes", "micro_batches"):
        in_use.pop(key, None)
    in_use[STEP_SIZE] = micro_batches_of_step(origin)
    in_use["documents are packed"] = in_use.pop("unpacked_why", None) is None
    in_use["loss"] = in_use.get("loss") or "plain torch"  # of versions that do not record it
    for key in WITH_REASON:
        if isinstance(in_use.get(key), str):
            in_use[key] = in_use[key].partition(": ")[0]
    return in_use


def compare_origins(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each difference between two origins, except those of the settings."""
    files, other_files = before["base"], now["base"]
    changes = [
        f"model.base: {name} has other contents"
        for name in sorted({*files, *other_files})
        if files.get(name) != other_files.get(name)
    ]
    digests = [digest for _, digest in before["data"]]
    changes += [
        f"{source}: its training examples have changed"
        for index, (source, digest) in enumerate(now["data"])
        if digests[index : index + 1] != [digest]
    ]
    if len(digests) > len(now["data"]):
        changes.append(f"number of data sources: {len(digests)} → {len(now['data'])}")
    if before.get("examples") not in (None, now["examples"]):  # checkpoints of qlora 0.1.0 lack it
        changes.append(f"number of examples: {_shown(before['examples'])} → {_shown(now['examples'])}")
    return changes + describe_changes(fixed_in_use(before), fixed_in_use(now))


def read_checked_origin(checkpoint: Path, config: RunConfig, may_change: set[str], ways_out: str) -> dict[str, Any]:
    """Read the origin of a checkpoint, see :func:`describe_origin`, and check that it has the config's settings.

    Args:
        checkpoint: Folder of the checkpoint.
        config: Config of the run.
        may_change: Keys whose values may differ.
        ways_out: Rest of the error's last sentence: what a user can do besides undoing the changes.

    Raises:
        CheckpointError: The origin is damaged.
        ConfigError: Settings differ.
    """
    origin = read_origin(checkpoint)
    data = origin.get("data")
    if not all(isinstance(origin.get(key), dict) for key in ("settings", "base", "in_use")) or not (
        isinstance(data, list) and all(isinstance(source, list) and len(source) == 2 for source in data)
    ):
        raise CheckpointError(
            f"{checkpoint} does not record what it was trained from; it was not written by qlora train."
        )
    check_same_settings(checkpoint, origin, config, may_change, ways_out)
    return origin


def check_same_settings(
    place: Path, origin: dict[str, Any], config: RunConfig, may_change: set[str], ways_out: str
) -> None:
    """Check that an origin has the config's settings.

    Args:
        place: Path of the run or checkpoint, for the error.
        origin: Origin of a run or checkpoint, see :func:`describe_origin`.
        config: Config of the run.
        may_change: Keys whose values may differ.
        ways_out: Rest of the error's last sentence: what a user can do besides undoing the changes.

    Raises:
        ConfigError: Settings differ.
    """
    settings = {
        key: value for key, value in flatten(config).items() if key not in FREE_KEYS | may_change | {ACCUMULATION}
    }
    changes = describe_changes(_with_defaults(origin["settings"]), settings)
    if changes:
        raise ConfigError(
            f"{place} was trained with other settings:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nUndo these changes, {ways_out}"
        )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's settings, with the defaults of keys that its version of qlora did not have."""
    minimal = {"model": {"base": "."}, "data": {"train": "."}, "train": {"output_dir": "."}}
    defaults = flatten(RunConfig.model_validate(minimal))
    completed, source = defaults | settings, defaults["data.train"][0]

    def complete(value: Any) -> Any:
        if isinstance(value, list):
            return [source | each if isinstance(each, dict) else each for each in value]
        return {name: complete(held) for name, held in value.items()} if isinstance(value, dict) else value

    return completed | {key: complete(completed[key]) for key in ("data.train", "data.eval", "data.retain")}
