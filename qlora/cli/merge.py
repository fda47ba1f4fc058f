"""`qlora merge`: release weights from a run."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import SHARD_SIZE, Adapter, AsJson, Base, Checkpoint, NewFolder, choose_adapter
from qlora.cli.report import show_report
from qlora.cli.stopping import stopping_with


def merge(
    run: Adapter,
    output: NewFolder,
    checkpoint: Checkpoint = None,
    base: Base = None,
    dtype: Annotated[
        Literal[
            "float16",
            "bfloat16",
            "float32",
            "fp16",
            "bf16",
            "fp32",
            "q8_0",
            "q5_0",
            "q4_0",
            "q6_k",
            "q5_k_m",
            "q5_k_s",
            "q4_k_m",
            "q4_k_s",
        ]
        | None,
        typer.Option(
            help="Dtype of the weights; those that begin with q for GGUF only, which has no float32. Those with k are "
            "written by llama.cpp's own quantizer, from llama-quantize or llama-cpp-python."
        ),
    ] = None,
    onto: Annotated[
        Literal["dequantized", "original", "best"] | None,
        typer.Option(
            help="Base weights: those that the adapter was trained on, those in the base's files (the default for an "
            "adapter made elsewhere), or the better in an evaluation (both merges are written at first, which takes "
            "twice the disk space)."
        ),
    ] = None,
    format: Annotated[
        Literal["safetensors", "gguf", "lora-gguf"],
        typer.Option(help="A folder for transformers, a file for llama.cpp, or one with the adapter alone for it."),
    ] = "safetensors",
    max_shard_size: Annotated[str | None, SHARD_SIZE] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda, cpu, …; default: the kind of device that the run was trained on, if available, else cpu."
        ),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Write nothing if DIR already holds this merge; move another merge in DIR to DIR.old-N first.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Merge into a base other than the one trained on.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the folder to owner/name; a new repository is private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="With --push-to-hub: merge and list what would be uploaded, but upload nothing."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge into weights that load with transformers alone; defaults come from the run's config.

    The same command continues an interrupted merge.
    """
    if format == "lora-gguf":
        unused = {"--dtype": dtype, "--onto": onto, "--device": device, "--force": force, "--push-to-hub": push_to_hub}
        unused |= {"--max-shard-size": max_shard_size}
        if given_in_vain := [option for option, value in unused.items() if value]:
            raise typer.BadParameter(
                f"{', '.join(given_in_vain)} does not apply to --format lora-gguf: nothing is merged."
            )
    block_type = dtype if dtype is not None and dtype.startswith("q") else None
    if block_type is not None and format != "gguf":
        raise typer.BadParameter(f"--dtype {dtype} needs --format gguf.")
    if max_shard_size is not None and format != "safetensors":
        raise typer.BadParameter(f"--max-shard-size does not apply to --format {format}, which writes one file.")
    if push_to_hub is None and (dry_run or public):
        raise typer.BadParameter("--dry-run and --public need --push-to-hub.")

    import_libraries()

    from qlora.checkpoint import adapter_digest
    from qlora.config import ExportSection, load_config
    from qlora.errors import ExportError
    from qlora.export.companions import REPORT_FILE
    from qlora.export.merge import default_onto
    from qlora.export.push import check_repo, push
    from qlora.model import open_source
    from qlora.training import merge as run_merge

    if push_to_hub is not None:
        check_repo(push_to_hub)
    run = choose_adapter(run, checkpoint)
    source = open_source(run, base)
    asked = {"dtype": None if block_type else dtype, "onto": onto, "max_shard_size": max_shard_size}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if source.run is None:
        settings = ExportSection(**{"onto": default_onto(source)} | given)
    else:
        overrides = [f"export.{key}={json.dumps(value)}" for key, value in given.items()]
        settings = load_config(source.run.config, overrides).export
    weights_dtype, onto_weights = block_type or settings.dtype, settings.onto
    if format == "lora-gguf":
        weights_dtype, onto_weights = "float32", "original"
    folder = Path(os.path.abspath(output))
    values = None
    if update and (folder / REPORT_FILE).exists():
        wanted = adapter_digest(source.folder), weights_dtype, onto_weights, format
        values, title = _report_if_same(folder, wanted), f"{output} already holds this merge: nothing was written."
    elif (folder / REPORT_FILE).exists():
        raise ExportError(
            f"{output} already holds a merge; choose another folder, or add --update to replace it if the run or "
            "the options have changed."
        )
    if values is None:
        if source.run is None and format != "lora-gguf":
            onto_what = f"the {settings.onto} weights of {source.base}"
            print(f"{run} was made elsewhere: merging onto {onto_what}, which may not be its own.", file=sys.stderr)
        next_call = "continues" if format == "safetensors" else "starts again"
        with stopping_with(f"The same command {next_call}."), _progress_bar(shown=not as_json) as on_progress:
            report = run_merge(
                run,
                output,
                weights_dtype,
                onto_weights,
                max_shard_size=settings.max_shard_size if format == "safetensors" else None,
                device=device,
                force=force,
                on_progress=on_progress,
                format=format,
                base=base,
            )
        what = "Wrote the adapter of" if format == "lora-gguf" else "Merged"
        values, title = report.as_dict(), f"{what} {report.merged} layers into {report.out_dir}."
    if push_to_hub is not None:
        pushed = push(folder, push_to_hub, not public, dry_run)
        values["pushed"] = pushed.as_dict()
    show_report(values, as_json, title)


def _report_if_same(folder: Path, wanted: tuple[str, str, str, str]) -> dict[str, Any] | None:
    """Return the report of the merge in a folder if it is the one wanted; else rename the folder."""
    from qlora.export.merged import read_merged
    from qlora.files import old_name

    merged = read_merged(folder)
    if merged.is_merge_of(*wanted):
        return merged.report
    old = old_name(folder)
    folder.rename(old)
    print(f"{folder} held another merge: moved it to {old}.", file=sys.stderr)
    return None


@contextmanager
def _progress_bar(shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield None
        return
    columns = (BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
