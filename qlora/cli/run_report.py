"""`qlora report`: runs as a table and as a page."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from qlora.cli.options import AsJson, expand_home
from qlora.cli.report import format_value, show_report

# Columns of the table, with their titles.
COLUMNS = {
    "run": "run", "status": "status", "steps": "steps", "best_loss": "best held-out loss", "loss": "loss",
    "learning_rate": "rate", "rank": "rank", "seconds": "time", "size": "size",
}  # fmt: skip


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs, or folders with runs in them.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the page here; default: RUN/report.html of one run, no page of several.",
            callback=expand_home,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run; compare several runs in a table, and with -o on a page."""
    from qlora.pages import report as make_report

    result = make_report(runs, output)
    if as_json:
        show_report(result.as_dict(), as_json)
        return
    if len(result.runs) == 1:
        show_report(result.runs[0].as_dict() | {"page": result.page}, as_json)
    else:
        _show_table([summary.as_dict() for summary in result.runs])
        print(f"page: {result.page}" if result.page else "Add -o FILE to compare them on a page.")
    for path, problem in result.damaged.items():
        print(f"{path} can't be read: {problem}")


def _show_table(summaries: Sequence[Mapping[str, Any]]) -> None:
    lines = [list(COLUMNS.values())]
    for summary in summaries:
        shown = {**summary, "steps": f"{summary['step']:,}/{summary['total_steps']:,}"}
        lines.append(["–" if shown[key] is None else format_value(key, shown[key]) for key in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
