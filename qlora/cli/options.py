"""Options that several verbs share."""

import os
import sys
from typing import Annotated

import typer


def expand_home(path: str | None) -> str | None:
    """Expand a leading ~, which shells don't expand in --option=~/… or for unknown users."""
    if path is None:
        return None
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise typer.BadParameter(f"{path!r} is in the home of an unknown user; write the full path.")
    return expanded


def _check_size(size: str | None) -> str | None:
    from qlora.config.sections import parse_size

    try:
        if size is not None:
            parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(f"{size!r} {error}.") from None
    return size


AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file; see qlora init.", callback=expand_home)]
Device = Annotated[str, typer.Option(help="cuda, cpu, …; auto takes a GPU if there is one.")]
NewFolder = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new folder.", callback=expand_home)]
SHARD_SIZE = typer.Option("--max-shard-size", help="Size limit of a weight file: 5GB, 500MB.", callback=_check_size)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that override the file, such as train.max_steps=100."),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="Base of an adapter made elsewhere, a folder or hub id; default: the one that its config names.",
        callback=expand_home,
    ),
]
Adapter = Annotated[
    str,
    typer.Argument(
        metavar="RUN|ADAPTER",
        help="A run's output_dir, one of its checkpoints, or a PEFT adapter made elsewhere.",
        callback=expand_home,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last|STEP",
        help="Checkpoint of the run; default: the best if the run keeps it (train.keep_best), else the last.",
    ),
]
RunDir = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's output_dir, or one of its checkpoints.", callback=expand_home)
]


def choose_adapter(path: str, checkpoint: str | None) -> str:
    """Return the path of the adapter that a run's path and --checkpoint name together.

    It says on standard error if the best checkpoint of a run is taken without being asked for.
    """
    from qlora.checkpoint import RunDirectory
    from qlora.errors import ConfigError

    run = RunDirectory.find(path)
    if checkpoint is not None:
        if run is None or not RunDirectory(path).exists():
            raise ConfigError(f"--checkpoint {checkpoint}: {path} is not a run's output_dir; omit --checkpoint.")
        return str(run.choose(checkpoint))
    best = run.read_record().best if run is not None and RunDirectory(path).exists() else None
    if run is not None and best is not None and run.read_record().is_finished and best.step != run.final_step:
        print(
            f"{path}: taking its best checkpoint, step {best.step} with {best.metric} {best.value:.4f}; --checkpoint "
            f"last takes step {run.final_step}.",
            file=sys.stderr,
        )
    return path
