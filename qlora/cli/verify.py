"""`qlora verify`: is a merged model what the run trained?"""

from typing import Annotated

import typer

from qlora.cli.options import AsJson, Device, RunDir
from qlora.cli.report import show_report


def verify(
    run: RunDir,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What qlora merge wrote.")],
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare a merged model with the run that it came from; exit 1 when they are apart."""
    from qlora.export import verify as run_verification

    report = run_verification(run, folder, device)
    verdict = "is" if report.matches else "is NOT"
    show_report(report.as_dict(), as_json, f"{folder} {verdict} what {run} trained.")
    if not report.matches:
        raise typer.Exit(1)
