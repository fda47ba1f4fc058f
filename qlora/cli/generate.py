"""`qlora generate`: the answer to one prompt, or to every prompt of a file."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora.cli.options import AsJson, Device, expand_home
from qlora.cli.report import show_report

Model = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder or hub id.", callback=expand_home)
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens in an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens that add up to this probability."),
]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The user's message.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Answer every row of a JSONL file: its prompt (text or turns), messages, or instruction.",
            callback=expand_home,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="With --prompts: a new JSONL file with the same rows and an 'answer' each.",
            callback=expand_home,
        ),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, or a file of prompts, through the chat template that the model was trained with."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either --prompt TEXT or --prompts FILE.")
    if (prompts is None) != (output is None):
        raise typer.BadParameter("--prompts FILE and --output FILE go together.")
    check_sampling(temperature, top_p)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    if prompts is not None and output is not None:
        count = _answer_file(model, prompts, Path(output), system, seed, device, settings)
        show_report({"prompts": count, "output": output}, as_json, f"Answered {count} prompts.")
        return

    import torch

    from qlora.model import generate as run_generation
    from qlora.model import load_model

    torch.manual_seed(seed)
    loaded, tokenizer = load_model(model, device)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": str(prompt)})
    answer = run_generation(loaded, tokenizer, messages, **settings)
    print(json.dumps({"prompt": prompt, "answer": answer}) if as_json else answer)


def check_sampling(temperature: float, top_p: float | None) -> None:
    """Refuse --top-p where nothing is sampled."""
    if top_p is not None and not temperature:
        raise typer.BadParameter("--top-p needs a --temperature above 0.")


def _answer_file(
    model: str, path: str, output: Path, system: str | None, seed: int, device: str, settings: dict[str, Any]
) -> int:
    """Answer every prompt of a file, one after another; the output appears when all are answered.

    Returns:
        The number of prompts.
    """
    from qlora.data.prompts import check_prompts, read_prompts
    from qlora.errors import ConfigError

    if output.exists():
        raise ConfigError(f"{output} exists already; name another file with -o.")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"{output} can't be written: {folder} is no folder that you may write to.")
    prompts = read_prompts(path, system)

    import torch
    from rich.console import Console
    from rich.progress import track

    from qlora.checkpoint import write_text
    from qlora.model import generate as run_generation
    from qlora.model import load_model

    torch.manual_seed(seed)
    loaded, tokenizer = load_model(model, device)
    check_prompts(tokenizer, prompts)
    lines, console = [], Console(stderr=True)
    for prompt in track(prompts, "", console=console, transient=True, disable=not console.is_terminal):
        conversation = prompt.conversation
        answer = run_generation(loaded, tokenizer, conversation.messages, tools=conversation.tools, **settings)
        lines.append(json.dumps(prompt.answered(answer), ensure_ascii=False) + "\n")
    write_text(output, "".join(lines))
    return len(prompts)
