"""`qlora predict`: the labels of a file's texts or images."""

from collections import Counter
from typing import Annotated

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, Checkpoint, Device, choose_adapter, expand_home
from qlora.cli.report import show_report
from qlora.cli.stopping import stopping_with


def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run that classifies, one of its checkpoints, or the folder that it was merged into.",
            callback=expand_home,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|DIR",
            help="Rows with a text or an image each, of any type that training reads; or a folder of images.",
            callback=expand_home,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A new JSONL file with the row's number, its id, its label and the probability of each label.",
            callback=expand_home,
        ),
    ],
    checkpoint: Checkpoint = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Column with the text or image; default: that of the run, else text or image."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images at a time.")] = 16,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Predict the label of every row of a file."""
    with stopping_with("Nothing was written. Run the same command again."):
        import_libraries()

        from qlora.model import predict as predict_labels

        predictions = predict_labels(choose_adapter(model, checkpoint), data, output, text, batch_size, device)
    found = [each.label if isinstance(each.label, list) else [each.label] for each in predictions]
    counts = Counter(name for names in found for name in names)
    report = {"rows": len(predictions), "labels": dict(counts.most_common()), "output": output}
    show_report(report, as_json, f"Predicted the labels of {len(predictions)} rows.")
