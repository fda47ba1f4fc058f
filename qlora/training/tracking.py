"""What accelerate's trackers get: settings, numbers, samples, and the files of a run that people look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config import RunConfig
from qlora.config.reference import as_yaml
from qlora.errors import ConfigError
from qlora.processes import Processes
from qlora.training.origin import flatten

PROJECT = "qlora"
# The argument of a tracker that names a run; the others name it themselves, or by its folder.
NAMED_BY = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}


class Tracking:
    """The trackers of a run; on every process but the first, and without any, it does nothing.

    Args:
        processes: Processes of the run.
        config: Config of the run.
        name: Name of the run.

    Raises:
        ConfigError: A tracker did not start.
    """

    def __init__(self, processes: Processes, config: RunConfig, name: str) -> None:
        self._processes = processes
        settings = {
            key: value if isinstance(value, bool | int | float | str) else as_yaml(value)
            for key, value in flatten(config).items()
        }
        options = {tracker: {key: name} for tracker, key in NAMED_BY.items()}
        try:
            processes.start_trackers(PROJECT, settings, options)
        except Exception as problem:  # of any kind, from a library that is not ours
            trackers = ", ".join(config.train.trackers)
            reason = " ".join(str(problem).split()).rstrip(".")
            raise ConfigError(
                f"train.trackers: {trackers} did not start: {reason}. Set it up, or take it off the list."
            ) from problem

    def log_numbers(self, values: Mapping[str, Any], step: int) -> None:
        """Send those values of a line of metrics.jsonl that are numbers."""
        numbers = {key: value for key, value in values.items() if key != "step" and isinstance(value, int | float)}
        self._processes.log(numbers, step)

    def log_samples(self, samples: Sequence[Mapping[str, str]], step: int) -> None:
        """Send samples to the trackers that show tables or text.

        Args:
            samples: A `prompt`, an `answer` and maybe a `reference` each.
            step: Number of steps done.
        """
        columns = ["step", "prompt", "answer", "reference"]
        rows = [[step, each["prompt"], each["answer"], each.get("reference", "")] for each in samples]
        for tracker in self._processes.trackers:
            if tracker.name == "wandb":
                tracker.log_table("samples", columns=columns, data=rows, step=step)
            elif tracker.name == "trackio":  # its dashboard shows no plain text
                from trackio import Table

                tracker.log({"samples": Table(columns=columns, data=rows)}, step=step)
            elif tracker.name == "tensorboard":
                texts = {f"sample/{number}": _as_text(each) for number, each in enumerate(samples, 1)}
                tracker.log(texts, step=step)


def send_files(processes: Processes, paths: Sequence[Path]) -> list[str]:
    """Send files to the trackers that keep files; TensorBoard has no place for them.

    Args:
        processes: Processes of the run, with their trackers started.
        paths: Files; those that do not exist are left out.

    Returns:
        A message for each tracker that failed: a network that is down fails no run.
    """
    problems = []
    for tracker in processes.trackers:
        try:
            for path in (each for each in paths if each.is_file()):
                if tracker.name == "wandb":
                    tracker.tracker.save(str(path), base_path=str(path.parent), policy="now")
                elif tracker.name == "mlflow":
                    tracker.log_artifact(str(path))
                elif tracker.name == "trackio":
                    tracker.tracker.log_artifact(path, type="run")
        except Exception as problem:
            names = ", ".join(path.name for path in paths)
            problems.append(f"{tracker.name} did not get the run's files ({names}): {problem}")
    return problems


def _as_text(sample: Mapping[str, str]) -> str:
    """Return a sample as text with its parts indented, which Markdown shows as they are."""
    return "\n\n".join(
        f"{part}:\n\n" + "\n".join(f"    {line}" for line in text.splitlines()) for part, text in sample.items()
    )
