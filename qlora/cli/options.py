"""Options that several verbs share."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
Device = Annotated[str, typer.Option(help="cuda, cpu, …; auto takes a GPU if there is one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value …")]
RunDir = Annotated[str, typer.Argument(metavar="RUN", help="A run's output directory.")]
