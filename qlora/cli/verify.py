"""`qlora verify`: is an adapter, or a merged model, what the run trained, and would other tools load the adapter?"""

from typing import Annotated

import typer

from qlora.cli.options import AsJson, Device, RunDir, expand_home
from qlora.cli.report import show_report


def verify(
    run: RunDir,
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]", help="What qlora merge wrote; without it, the run's adapter.", callback=expand_home
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare a merged model, or the adapter by itself, with the run that it came from; exit 1 when they are apart.

    Told as well, whatever is compared: whether PEFT, vLLM and llama.cpp would load the run's adapter.
    """
    from qlora.proof import verify as run_verification

    report = run_verification(run, folder, device)
    values = report.as_dict()
    if not as_json:  # a line for each client and each problem
        values = {
            key: value for key, value in values.items() if value is not None and key not in ("problems", "clients")
        }
        values |= {client: str(verdict) for client, verdict in report.clients.items()}
    verdict = "is" if report.matches else "is NOT"
    title = f"{folder or 'The adapter'} {verdict} what {run} trained."
    if folder is not None and report.base_differs:
        title += f"\n- on another base than the one trained on: {', '.join(report.base_differs)} differ"
    show_report(values, as_json, "\n".join([title, *(f"- {problem}" for problem in report.problems)]))
    if not report.matches:
        raise typer.Exit(1)
