"""`qlora tune`: a short search for the best learning rate."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, ConfigFile, Overrides, expand_home
from qlora.cli.report import show_report
from qlora.cli.stopping import stopping_with
from qlora.errors import ConfigError


def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for training and evaluating: 90s, 10m, 2h.")
    ] = "10m",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the config with the best learning rate to a new file.",
            callback=expand_home,
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE", help="Draw loss over learning rate as a PNG.", callback=expand_home),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare learning rates by held-out loss after a few steps; nothing is written to output_dir."""
    from qlora.config import load_config
    from qlora.config.sections import parse_duration

    try:
        parse_duration(budget)
    except ValueError as error:
        raise typer.BadParameter(f"--budget {budget}: {error}") from None
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} already exists; name another file with -o.")
    for path in filter(None, (output, plot)):
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{path} can't be written: its folder does not exist; create it first.")
    if plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; install it, or leave --plot out.")
    settings = load_config(config, overrides or ())
    import_libraries()

    from qlora.training import tune as run_search

    with stopping_with("Nothing was written."):
        report = run_search(settings, budget, show_progress=True)
    if as_json:
        show_report(report.as_dict(), as_json)
    else:
        _show(report)
    if output is not None:
        _write(Path(output), settings, report)
    if plot is not None:
        _draw(report, Path(plot), settings.model.base)


def _show(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for title in ("learning rate", *(f"step {steps:,}" for steps in report.rounds)):
        table.add_column(title, justify="right", no_wrap=True)
    for trial in report.trials:
        cells = [f"{trial.losses[steps]:.4f}" if steps in trial.losses else "" for steps in report.rounds]
        style = "bold" if trial.learning_rate == report.learning_rate else ""
        table.add_row(f"{trial.learning_rate:g}", *cells, style=style)
    console.print(f"Held-out loss, {report.first_loss:.4f} before training:")
    console.print(table)
    for line in (*report.notes, f"Best: train.learning_rate={report.learning_rate:g}"):
        console.print(line, markup=False)


def _draw(report: Any, target: Path, title: str) -> None:
    from qlora.training.plot import draw_rates

    if not draw_rates({trial.learning_rate: trial.losses for trial in report.trials}, target, title):
        raise ConfigError(f"--plot {target} can't be written.")


def _write(target: Path, settings: Any, report: Any) -> None:
    """Write the keys that the config sets, with the best rate."""
    import yaml

    from qlora.files import write_text

    values = settings.model_dump(mode="json", exclude_unset=True)
    values["train"]["learning_rate"] = report.learning_rate
    if settings.train.min_learning_rate > report.learning_rate:
        values["train"]["min_learning_rate"] = report.learning_rate
    tried = ", ".join(f"{trial.learning_rate:g}" for trial in report.trials)
    comment = f"# train.learning_rate: the best of {tried} after {report.rounds[-1]} steps, found by qlora tune.\n"
    write_text(target, comment + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
