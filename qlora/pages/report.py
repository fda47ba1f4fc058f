"""Runs as a table and as a page: one run, several, or all of a folder."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qlora.checkpoint import RunDirectory
from qlora.errors import CheckpointError, QLoRAError
from qlora.files import write_text
from qlora.pages.page import points_of_each, render_page
from qlora.pages.run import describe_run
from qlora.pages.summary import RunSummary, find_runs, summarize

T = TypeVar("T")


@dataclass(frozen=True, slots=True, repr=False)
class RunsReport:
    """Result of :func:`report`.

    Attributes:
        runs: A line for each run.
        page: The page that was written; None if there is none.
        damaged: Runs of a folder that can't be read, by path, with what is wrong.
    """

    runs: list[RunSummary]
    page: str | None
    damaged: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<RunsReport: {len(self.runs)} runs{'' if self.page is None else f', {self.page}'}>"


def report(paths: str | Path | Sequence[str | Path], output: str | Path | None = None) -> RunsReport:
    """Summarize runs, and write a page that shows or compares them.

    Args:
        paths: Runs, checkpoints of runs, or folders with runs in them; one or several.
        output: Where to write the page. None for `RUN/report.html` if there is one run, and no page of several.

    Raises:
        CheckpointError: A path has no run, a run that is named is damaged, or the page can't be written.
    """
    named = [Path(each).expanduser() for each in ([paths] if isinstance(paths, str | Path) else paths)]
    owners = {path: RunDirectory.find(path) for path in named}
    found = {path: find_runs(path) if own is None else [own] for path, own in owners.items()}
    if empty := [str(path) for path, runs in found.items() if not runs]:
        raise CheckpointError(f"There is no run in {', '.join(empty)}; name runs, or folders with runs in them.")
    # A run may be named twice, or be in a folder that is named as well.
    runs = list({run.path.resolve(): run for each in found.values() for run in each}.values())
    are_named = {own.path.resolve() for own in owners.values() if own is not None}
    target = Path(output).expanduser() if output is not None else runs[0].page if len(runs) == 1 else None
    values, summaries, damaged = [], [], {}
    for run in runs:
        try:
            if target is None:
                summaries.append(_read(run, summarize))
            else:
                values.append(_read(run, partial(describe_run, num_points=points_of_each(len(runs)))))
                summaries.append(RunSummary(**values[-1]["summary"]))
        except QLoRAError as problem:
            if run.path.resolve() in are_named:  # not found in a folder
                raise
            damaged[str(run.path)] = str(problem)
    if not summaries:
        reasons = "".join(f"\n  {problem}" for problem in damaged.values())
        raise CheckpointError(f"There is no run in {', '.join(map(str, named))} that can be read.{reasons}")
    if target is not None:
        write_text(target, render_page(values))
    return RunsReport(summaries, None if target is None else str(target), damaged)


def _read(run: RunDirectory, read: Callable[[RunDirectory], T]) -> T:
    """Return what a function reads of a run.

    Raises:
        QLoRAError: A file of the run is damaged, or has a value of another kind than it should.
    """
    try:
        return read(run)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as problem:
        raise CheckpointError(
            f"{run.path} has a damaged file, with a value of the wrong kind: {type(problem).__name__}: {problem}."
        ) from problem
