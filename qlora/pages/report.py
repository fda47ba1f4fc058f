"""Runs as a table and as a page: one run, several, or all of a folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.checkpoint import RunDirectory
from qlora.errors import CheckpointError, QLoRAError
from qlora.files import write_text
from qlora.pages.page import points_of_each, render_page
from qlora.pages.run import describe_run
from qlora.pages.summary import RunSummary, find_runs, summarize


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
        CheckpointError: There is no run, a run that is named is damaged, or the page can't be written.
    """
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    owners = {str(path): RunDirectory.find(path) for path in (Path(each).expanduser() for each in named)}
    runs = [run for path, own in owners.items() for run in (find_runs(Path(path)) if own is None else [own])]
    target = Path(output).expanduser() if output is not None else runs[0].page if len(runs) == 1 else None
    values, summaries, damaged = [], [], {}
    for run in runs:
        try:
            if target is not None:
                values.append(describe_run(run, points_of_each(len(runs))))
            summaries.append(summarize(run) if target is None else RunSummary(**values[-1]["summary"]))
        except QLoRAError as problem:
            if run in owners.values():  # named, not found in a folder
                raise
            damaged[str(run.path)] = str(problem)
    if not summaries:
        reasons = "".join(f"\n  {problem}" for problem in damaged.values())
        raise CheckpointError(f"There is no run in {', '.join(map(str, named))} that can be read.{reasons}")
    if target is not None:
        try:
            write_text(target, render_page(values))
        except OSError as problem:
            raise CheckpointError(f"{target} can't be written: {problem.strerror or problem}.") from problem
    return RunsReport(summaries, None if target is None else str(target), damaged)
