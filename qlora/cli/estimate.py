"""`qlora estimate`: peak memory by kind and level of activation checkpointing, without loading a model."""

from typing import Annotated, Any

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, ConfigFile, Overrides
from qlora.cli.report import show_report

BAR_WIDTH, TABLE_WIDTH = 60, 124
STYLES = {
    "weights": "blue", "adapters": "cyan", "optimizer": "magenta", "activations": "green", "loss": "yellow",
    "buffers": "red", "context": "white",
}  # fmt: skip
FREE = "·"


def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|NAME",
            help="Assume a GPU with this much free memory, such as 24GB or 24GiB, or of this name, such as 4090, for "
            "which the time of a step is computed too; default: this machine.",
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, each with a GPU.")] = 1,
    probe: Annotated[bool, typer.Option("--probe", help="Also load the model and measure a step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict peak memory by kind and level of activation checkpointing, and what fits; no model is loaded.

    It needs only the base's config.json, and exits with 1 if the run does not fit.
    """
    if probe and gpu is not None:
        raise typer.BadParameter("--probe measures on this machine; omit --gpu.")
    if probe and processes > 1:
        raise typer.BadParameter("--probe measures one process; omit --processes.")
    if gpu is not None:
        _check_gpu(gpu)

    from qlora.config import load_config

    settings = load_config(config, overrides or ())
    import_libraries()

    from qlora.training import estimate as run_estimation

    result = run_estimation(settings, gpu, processes)
    report = result.as_dict()
    if probe:
        from qlora.memory.probe import measure_step, prepare
        from qlora.model import resolve_device
        from qlora.objectives import training_loss

        level = result.level or list(result.levels)[-1]
        expected = result.levels[level]["total"] - result.levels[level]["bytes"]["context"]
        model, prepared, loss = prepare(settings, resolve_device(), training_loss(settings.train))
        measured = measure_step(model, prepared, level, loss)
        report["probe"] = {"level": level, "measured": measured, "estimated": expected, "ratio": expected / measured}
    if as_json:
        show_report(report, as_json)
    else:
        _show(report, settings.model.base)
    if result.level is None:
        raise typer.Exit(1)


def _check_gpu(text: str) -> None:
    from qlora.memory.cards import read_gpu

    try:
        read_gpu(text)
    except ValueError as error:
        raise typer.BadParameter(f"--gpu {text}: {error}") from None


def _show(report: dict[str, Any], base: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    levels, free = report["levels"], report["free_bytes"]
    largest = max(level["total"] for level in levels.values())
    unit, scale = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    count, length = report["micro_batch_size"], report["max_seq_len"]
    size = f"{count} images" if report["of_images"] else f"{count} × {length} tokens"
    console.print(
        Text(
            f"{base} on {report['device']} in {report['compute_dtype']}: {size}, {free / scale:.2f} {unit} free; "
            f"all in {unit}"
        )
    )
    table = Table(box=None, pad_edge=False)
    fitting = ["images that fit"] if report["of_images"] else ["rows that fit", "longest row"]
    for title in ["recompute", *STYLES, "total", *fitting]:
        table.add_column(title, justify="left" if title == "recompute" else "right", no_wrap=True)
    for name, level in levels.items():
        cells = [f"{number / scale:.2f}" for number in [*level["bytes"].values(), level["total"]]]
        cells += [str(level["largest_micro_batch"]), str(level["longest_context"])][: len(fitting)]
        style = "bold" if name == report["level"] else "" if level["fits"] else "dim"
        table.add_row(name, *cells, style=style)
    # At full width even if the width of the screen is unknown.
    Console(width=max(console.width, TABLE_WIDTH), highlight=False).print(table)
    shown = report["level"] or list(levels)[-1]
    console.print(_bar(levels[shown]["bytes"], free, coloured))
    why = f"recompute {report['level']}: {report['why']}" if report["level"] else report["why"]
    console.print(Text(why, style="" if report["level"] else "bold red"))
    if len(report["places"]) > 1 and (report["weights"] != "device" or report["processes"] > 1):
        _show_places(console, report)
    if report["unpacked_why"] is not None:
        console.print(Text(f"documents are not packed, because {report['unpacked_why']}"))
    if not levels[shown]["bytes"]["activations"]:
        console.print(Text("memory peaks in the optimizer's step, when there are no activations"))
    if levels[shown]["bytes"]["context"]:
        console.print(Text(f"context: {levels[shown]['bytes']['context'] / scale:.2f} {unit} for CUDA itself, assumed"))
    if "probe" in report:
        measured = report["probe"]
        console.print(
            Text(
                f"measured at {measured['level']}: {measured['measured'] / scale:.2f} {unit}, estimated "
                f"{measured['estimated'] / scale:.2f} ({measured['ratio']:.1%}), both without context"
            )
        )


def _show_places(console: Any, report: dict[str, Any]) -> None:
    """Show where the weights may be, what that takes, and what it costs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    titles = ["weights", "recompute", "device GiB", "host GiB", "copied GB a step"]
    is_timed = "compute_seconds" in report["places"]["device"]
    titles += ["compute s", "copy s", "hidden from tokens"] if is_timed else []
    for title in titles:
        table.add_column(title, justify="left" if title in titles[:2] else "right", no_wrap=True)
    for name, place in report["places"].items():
        cells = [place["level"], f"{place['total'] / 2**30:.2f}", f"{place['host_bytes'] / 2**30:.2f}"]
        cells.append(f"{place['copied_bytes'] / 1e9:.1f}")
        if is_timed:
            cells += [f"{place[key]:.1f}" for key in ("compute_seconds", "copy_seconds")]
            cells.append(f"{place['hidden_from']:,}" if place["hidden_from"] else "–")
        table.add_row(name, *cells, style="bold" if name == report["weights"] else "" if place["fits"] else "dim")
    console.print(Text(f"weights {report['weights']}: {report['weights_why']}"))
    Console(width=max(console.width, TABLE_WIDTH), highlight=False).print(table)
    if is_timed:
        console.print(Text("times are computed from data sheets, at half of the products and 80% of the bus"))


def _bar(bytes_by_kind: dict[str, int], free: int, coloured: bool) -> Any:
    """Return a bar of used memory by kind and of free memory; without colors, kinds are letters."""
    from rich.text import Text

    text, key = Text(), Text("\n")
    whole = max(free, sum(bytes_by_kind.values()))
    so_far = drawn = 0
    for kind, number in bytes_by_kind.items():
        so_far += number
        cells = round(so_far / whole * BAR_WIDTH) - drawn
        drawn += cells
        letter = "█" if coloured else "a" if kind == "activations" else kind[0].upper()
        text.append(letter * cells, style=STYLES[kind] if coloured else "")
        if number:
            key.append(f"{letter} {kind}  ", style=STYLES[kind] if coloured else "")
    text.append(FREE * (BAR_WIDTH - drawn))
    over = sum(bytes_by_kind.values()) - free
    key.append(f"{FREE} free" if over <= 0 else f"{over / 2**30:.2f} GiB too much")
    return text.append_text(key)
