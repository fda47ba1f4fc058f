"""`qlora preview`: samples with their supervised tokens in color, and row statistics, without a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, ConfigFile, Overrides, expand_home
from qlora.cli.report import show_report

BAR_WIDTH = 40
# Least number of columns of a terminal that shows the answers of a pair side by side.
LEAST_WIDTH = 100
# Control characters in data are shown as symbols: a terminal would act on them.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    num_samples: Annotated[int, typer.Option("-n", "--samples", min=0, help="Examples to show.")] = 5,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write an HTML page.", callback=expand_home)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens are supervised, in color, and row statistics; no model is loaded."""
    from qlora.config import load_config

    settings = load_config(config, overrides or ())
    import_libraries()

    from qlora.training import preview as look

    result = look(settings, num_samples)
    if html is not None:
        from qlora.cli.preview_page import write_page

        write_page(Path(html), result, config)
    if as_json:
        show_report(result.as_dict(), as_json)
    else:
        _show(result)
    if result.problems:
        raise typer.Exit(1)


def _show(result: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    from qlora.data.problems import counted

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    key = "green: supervised, dim: not, reversed: control tokens" if coloured else "supervised: between ⟦ ⟧"
    for first, second in result.pairs:
        if second is None:
            about = "" if first.image is not None else f" ({key})"
            console.rule(Text(_title(first, result.group_size) + about), align="left")
            console.print(_text_of(first.pieces, coloured))
        else:
            console.rule(Text(f"pair {first.number // 2} ({key})"), align="left")
            _show_pair(console, first, second, coloured)
    for report in result.reports:
        console.rule(Text(report.source), align="left")
        for line in report.summary().splitlines():
            console.print(Text(line))
        for problem in report.problem_lines():
            console.print(Text(f"  {problem}", style="red"))
        if report.format == "images":
            continue
        console.print(Text(f"  length in tokens: {', '.join(f'{name} {n}' for name, n in report.lengths.items())}"))
        for low, high, count, share in report.bars():
            over = high > result.max_seq_len
            bar = "█" * max(1, round(share * BAR_WIDTH)) if count else ""
            label = f"  {low:>7}–{high:<7} {bar} {count}{'  longer than max_seq_len' if over and count else ''}"
            console.print(Text(label, style="yellow" if over else ""))
    console.rule(Text("an epoch"), align="left")
    size = result.group_size
    compared = " and as many that their KL is measured on" if result.unit == "rated answers" else ""
    packing = "not packed" if result.packing_fill is None else f"{result.packing_fill:.1%} full"
    others = "".join(f", {count // size:,} of {name}" for name, count in result.held_out.items() if name != "eval")
    sequences = (
        f", {result.tokens_per_epoch:,} tokens in {counted(result.rows_per_epoch, 'sequence')} of up to "
        f"{result.max_seq_len * size:,} ({packing})"
    )
    console.print(
        Text(
            f"{result.train_examples // size:,} {result.unit}{compared}{'' if result.unit == 'images' else sequences}: "
            f"{counted(result.steps_per_epoch, 'step')}; {result.total_steps:,} in the whole run; "
            f"{result.eval_examples // size:,} {result.unit} held out{others}"
        )
    )
    if result.adapted:
        layers = ", ".join(f"{count} × {name}" for name, count in result.adapted.items())
        console.print(Text(f"adapters: {layers}"))
    for problem in result.problems:
        console.print(Text(f"this config can't be trained: {problem}", style="bold red"))


def _title(sample: Any, group_size: int) -> str:
    kind = "" if sample.counts_as is None else f" ({sample.counts_as})"
    number = sample.number // group_size
    if sample.image is not None:
        return f"image {number}{kind}; --html FILE shows it"
    return f"example {number}{kind}: {sample.num_tokens:,} tokens, {sample.num_supervised:,} supervised"


def _show_pair(console: Any, chosen: Any, rejected: Any, coloured: bool) -> None:
    """Show the prompt that two answers share, then the answers: side by side on a wide terminal."""
    from rich.table import Table
    from rich.text import Text

    from qlora.data import split_shared

    prompt, *answers = split_shared(chosen.pieces, rejected.pieces)
    if prompt:
        console.print(_text_of(prompt, coloured), end="" if prompt[-1].text.endswith("\n") else "\n")
    titles = [
        f"{each.counts_as}: {each.num_tokens:,} tokens, {each.num_supervised:,} supervised"
        for each in (chosen, rejected)
    ]
    if console.is_terminal and console.width >= LEAST_WIDTH:
        table = Table.grid(expand=True, padding=(0, 2))
        for _ in answers:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(title, style="bold") for title in titles))
        table.add_row(*(_text_of(answer, coloured) for answer in answers))
        console.print(table, soft_wrap=False)
        return
    for title, answer in zip(titles, answers, strict=True):
        console.print(Text(f"– {title}", style="bold"))
        console.print(_text_of(answer, coloured))


def _text_of(pieces: list[Any], coloured: bool) -> Any:
    from rich.text import Text

    text = Text()
    for before, piece in zip([None, *pieces], pieces, strict=False):
        shown = piece.text.translate(VISIBLE)
        if not coloured:
            was_supervised = before is not None and before.weight > 0
            if (piece.weight > 0) != was_supervised:
                text.append("⟦" if piece.weight > 0 else "⟧")
            text.append(shown)
            continue
        style = "green" if piece.weight > 0 else "dim"
        text.append(shown, style=f"{style} reverse" if piece.is_special else style)
        if piece.weight not in (0, 1):
            text.append(f"×{piece.weight:g}", style="yellow")
    if not coloured and pieces and pieces[-1].weight > 0:
        text.append("⟧")
    return text
