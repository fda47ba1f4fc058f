"""`qlora merge`: release weights from a run."""

from typing import Annotated, Any, Literal

import typer

from qlora.cli.options import AsJson, RunDir
from qlora.cli.report import show_report


def merge(
    run: RunDir,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    dtype: Annotated[Literal["float16", "bfloat16", "float32"] | None, typer.Option(help="Of the weights.")] = None,
    onto: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(help="Base weights: as the adapter was trained on, or as in the files."),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Of a weight file: 5GB, 500MB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge into weights that load with transformers alone; defaults come from the run's config."""
    from qlora.checkpoint import RunDirectory
    from qlora.config import load_config
    from qlora.export import merge as run_merge

    given: dict[str, Any] = {"dtype": dtype, "onto": onto, "max_shard_size": max_shard_size}
    overrides = [f"export.{key}={value}" for key, value in given.items() if value is not None]
    settings = load_config(RunDirectory.open(run).config, overrides).export
    report = run_merge(run, output, **settings.model_dump())
    show_report(report.as_dict(), as_json, f"Merged {report.merged} layers into {report.out_dir}.")
