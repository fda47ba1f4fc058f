"""`qlora eval`: loss and metrics on held-out rows of a run, or of the base that a config starts from."""

from typing import Annotated, Any

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, Base, Checkpoint, Device, choose_adapter, expand_home
from qlora.cli.report import show_report

# Number of labels up to which the whole matrix fits a terminal.
MATRIX_LABELS = 10


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
    """Print the objective's loss and its metrics on held-out rows; of a classification, also results by label."""
    import_libraries()

    from qlora.checkpoint import is_evaluated, metric_label
    from qlora.training import evaluate as run_evaluation

    target = choose_adapter(target, checkpoint)
    report = run_evaluation(target, data, batch_size, device, base, metric or None)
    values = report.as_dict()
    if as_json:
        show_report(values, as_json)
        return
    shown = {key: value for key, value in values.items() if key not in ("labels", "confusion")}
    show_report(
        {metric_label(key) if is_evaluated(key, shown) else key: value for key, value in shown.items()}, as_json
    )
    if report.labels:
        print("\n".join(["", *_label_lines(report.labels), *_confusion_lines(report.labels, report.confusion)]))


def _label_lines(labels: list[dict[str, Any]]) -> list[str]:
    """Return a table with a line for each label."""
    width = max(len("label"), *(len(each["label"]) for each in labels))
    shown = [
        f"  {each['label']:<{width}}  {each['precision']:>9.1%}  {each['recall']:>6.1%}  {each['f1']:>6.1%}  "
        f"{each['texts']:>7,}"
        for each in labels
    ]
    return [f"  {'label':<{width}}  precision  recall      F1    texts", *shown]


def _confusion_lines(labels: list[dict[str, Any]], confusion: list[Any]) -> list[str]:
    """Return the matrix of labels and predicted labels; with many labels, the pairs that are confused most often."""
    names = [each["label"] for each in labels]
    if isinstance(confusion[0][0], list):  # a text can have several labels
        return []
    width = max(map(len, names))
    if len(names) <= MATRIX_LABELS:
        columns = [max(len(name), 5) for name in names]
        head = "  ".join(f"{name:>{size}}" for name, size in zip(names, columns, strict=True))
        rows = [
            f"  {name:<{width}}  " + "  ".join(f"{count:>{size},}" for count, size in zip(counts, columns, strict=True))
            for name, counts in zip(names, confusion, strict=True)
        ]
        return ["", "  predicted, by label:", f"  {'':<{width}}  {head}", *rows]
    pairs = sorted(
        ((count, names[own], names[other]) for own, row in enumerate(confusion) for other, count in enumerate(row)
         if count and own != other),
        key=lambda pair: -pair[0],
    )  # fmt: skip
    shown = [f"  {count:>5,}  {own} → {other}" for count, own, other in pairs[:MATRIX_LABELS]]
    return ["", "  most often confused:", *shown] if shown else []
