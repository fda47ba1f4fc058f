"""`qlora verify`: compare an adapter, or a merged model, with the run that trained it."""

from typing import Annotated

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import Adapter, AsJson, Base, Checkpoint, Device, choose_adapter, expand_home
from qlora.cli.report import show_report


def verify(
    run: Adapter,
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]",
            help="A folder that qlora merge wrote; default: the run's adapter alone.",
            callback=expand_home,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
    device: Device = "auto",
    clients: Annotated[
        bool,
        typer.Option(
            "--clients",
            help="Load DIR in each installed client that reads it (transformers and vLLM, or llama-cpp-python), and "
            "compare greedy answers with the run's.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a merged model, or the adapter alone, with its run; exits with 1 on a mismatch.

    It also says whether PEFT, vLLM and llama.cpp would load the run's adapter; --clients runs a release in them, and
    exits with 1 too if it could be run in none.
    """
    import_libraries()

    from qlora.proof import verify as run_verification

    run = choose_adapter(run, checkpoint)
    report = run_verification(run, folder, device, base, in_clients=clients)
    values = report.as_dict()
    if not as_json:  # one line per client and problem
        omitted = ("matches", "problems", "clients", "served")
        values = {key: value for key, value in values.items() if key not in omitted}
        values |= {client: str(verdict) for client, verdict in report.clients.items()}
        values |= {f"answers in {client}": str(served) for client, served in report.served.items()}
    # Clients are run only on a release that matches.
    in_clients = any(served.problems for served in report.served.values())
    none_ran = clients and report.matches and not any(served.prompts for served in report.served.values())
    verdict = "is" if report.matches or in_clients else "is NOT"
    but = ", but a client differs" if in_clients else ", but no client could run it" if none_ran else ""
    title = f"{folder or 'The adapter'} {verdict} what {run} trained{but}."
    if folder is not None and report.base_differs:
        title += f"\n- on a base other than the one used in training: {', '.join(report.base_differs)} differ"
    show_report(values, as_json, "\n".join([title, *(f"- {problem}" for problem in report.problems)]))
    if not report.matches or none_ran:
        raise typer.Exit(1)
