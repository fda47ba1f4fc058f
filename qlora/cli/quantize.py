"""`qlora quantize`: a model in bitsandbytes' 4 bits, on disk."""

from typing import Annotated, Literal

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import SHARD_SIZE, AsJson, Device, NewFolder, expand_home
from qlora.cli.report import show_report


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN",
            help="A folder, or a model id on the hub; or a run, for the base that its adapter fits.",
            callback=expand_home,
        ),
    ],
    output: NewFolder,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the blocks' statistics too.")
    ] = True,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Dtype of the rest, and of the weights before quantization; auto is the model's own."),
    ] = "auto",
    max_shard_size: Annotated[str, SHARD_SIZE] = "5GB",
    device: Device = "cpu",
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in 4 bits, which transformers and qlora train load as it is."""
    import_libraries()

    from qlora.export.quantize import quantize_model

    report = quantize_model(
        model,
        output,
        double_quant,
        dtype,
        max_shard_size=max_shard_size,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    show_report(report.as_dict(), as_json, f"Quantized {report.quantized} layers into {report.out_dir}.")
