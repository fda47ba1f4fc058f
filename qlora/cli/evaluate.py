"""`qlora eval`: held-out loss of a run, or of the base that a config starts from."""

from typing import Annotated

import typer

from qlora.cli.options import AsJson, Base, Checkpoint, Device, choose_adapter, expand_home
from qlora.cli.report import show_report


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN|ADAPTER",
            help="A config, for its base, a run with its adapter, or a PEFT adapter made elsewhere, with --data.",
            callback=expand_home,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="A file to evaluate on instead of the config's held-out data.", callback=expand_home),
    ] = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 4,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME|FILE.py:FUNCTION",
            help="A metric of answers instead of the config's eval.metrics; may be given several times.",
        ),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Print loss and perplexity per supervised token, and bits per byte."""
    from qlora.checkpoint import is_evaluated, metric_label
    from qlora.training import evaluate as run_evaluation

    target = choose_adapter(target, checkpoint)
    values = run_evaluation(target, data, batch_size, device, base, metric or None).as_dict()
    if not as_json:
        values = {metric_label(key) if is_evaluated(key) else key: value for key, value in values.items()}
    show_report(values, as_json)
