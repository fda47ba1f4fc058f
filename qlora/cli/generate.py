"""`qlora generate`: the answer to one prompt, or to every prompt of a file."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, Base, Checkpoint, Device, choose_adapter, expand_home
from qlora.cli.report import show_report
from qlora.cli.stopping import Terminated, stopping_with

if TYPE_CHECKING:
    from qlora.data.examples import Conversation
    from qlora.data.prompts import Prompt

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN|ADAPTER|MODEL",
        help="A run, a PEFT adapter made elsewhere, or a model folder or hub id.",
        callback=expand_home,
    ),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens in an answer.")]
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
            help="Answer every row of a file, as JSONL or CSV: its prompt (text or turns), messages, or instruction.",
            callback=expand_home,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="With --prompts: a new JSONL file with the same rows and an 'answer' each. The same command continues "
            "an interrupted one.",
            callback=expand_home,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
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
    import_libraries()
    model = choose_adapter(model, checkpoint)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    if prompts is not None and output is not None:
        with stopping_with("Nothing was answered. Run the same command again."):
            count = _answer_file(
                model, base, prompts, Path(output), system, seed=seed, device=device, settings=settings
            )
        show_report({"prompts": count, "output": output}, as_json, f"Answered {count} prompts.")
        return

    from qlora.data.examples import Conversation
    from qlora.data.prompts import check_prompt
    from qlora.data.serving import TemplateFacts
    from qlora.model.generate import ready_to_answer

    loaded, tokenizer = load(model, base, device)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": str(prompt)})
    conversation = Conversation(messages)
    check_prompt(tokenizer, TemplateFacts(tokenizer), conversation)
    with ready_to_answer(loaded):
        answer = _answer(loaded, tokenizer, conversation, seed, settings)
    print(json.dumps({"prompt": prompt, "answer": answer}) if as_json else answer)


def check_sampling(temperature: float, top_p: float | None) -> None:
    """Check that --top-p comes with a temperature above 0."""
    if top_p is not None and not temperature:
        raise typer.BadParameter("--top-p needs a --temperature above 0.")


def load(model: str, base: str | None, device: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer, and say on standard error what an adapter made elsewhere is loaded onto."""
    from qlora.model import find_foreign, load_model
    from qlora.model.generate import check_generates

    check_generates(model, base)
    foreign = find_foreign(model, base)
    if foreign is not None:
        print(f"{model} was made elsewhere; its base {foreign.base} is loaded in 4 bits (NF4).", file=sys.stderr)
    return load_model(model, device, base)


def _answer_file(
    model: str,
    base: str | None,
    path: str,
    output: Path,
    system: str | None,
    seed: int,
    device: str,
    settings: dict[str, Any],
) -> int:
    """Answer every prompt of a file, one after another; the output appears when all are answered.

    Until then each answer is appended to a file next to it, from which the same command continues.

    Returns:
        The number of prompts.
    """
    from qlora.data.prompts import check_prompts, read_prompts
    from qlora.errors import ConfigError, DataError

    if output.exists():
        raise ConfigError(f"{output} already exists; name another file with -o.")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"{output} can't be written: {folder} is not a writable folder.")
    prompts = read_prompts(path, system)

    from qlora.checkpoint import RunDirectory, adapter_digest
    from qlora.files import make_folder, sync
    from qlora.model import find_foreign, open_source
    from qlora.model.generate import ready_to_answer

    is_adapter = RunDirectory.find(model) is not None or find_foreign(model, base) is not None
    adapter = adapter_digest(open_source(model, base).folder) if is_adapter else None
    same_answers = [[prompt.columns for prompt in prompts], system, model, base, adapter, seed, settings]
    key = hashlib.sha256(json.dumps(same_answers).encode()).hexdigest()[:12]
    partial = output.with_name(f"{output.name}.{key}.partial")
    loaded, tokenizer = load(model, base, device)
    check_prompts(tokenizer, prompts)
    try:
        make_folder(output.parent)
        with partial.open("a+b") as file, ready_to_answer(loaded):
            done = _whole_lines(file)
            for prompt in _shown(prompts[done:], done):
                answer = _answer(loaded, tokenizer, prompt.conversation, seed + done, settings)
                file.write(prompt.answered(answer).encode())
                file.flush()
                done += 1
        sync(partial)
        partial.rename(output)
        sync(output.parent)
    except OSError as error:
        raise DataError(
            f"{partial} can't be written: {error.strerror or error}; the same command continues."
        ) from error
    except (KeyboardInterrupt, Terminated) as stop:
        stop.add_note(
            f"{done} of {len(prompts)} prompts are answered, in {partial}. The same command continues from there."
        )
        raise
    return len(prompts)


def _whole_lines(file: BinaryIO) -> int:
    """Count the lines of a file, and drop an unfinished last line that a killed process left."""
    file.seek(0)
    written = file.read()
    file.truncate(written.rfind(b"\n") + 1)
    return written.count(b"\n")


def _shown(prompts: "list[Prompt]", done: int) -> "Iterable[Prompt]":
    """Return the remaining prompts, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if done:
        console.print(f"Continuing after {done} of {done + len(prompts)} prompts.")
    return track(prompts, "", console=console, transient=True, disable=not console.is_terminal)


def _answer(model: Any, tokenizer: Any, conversation: "Conversation", seed: int, settings: dict[str, Any]) -> str:
    """Answer one conversation with its own seed, so that a continued file gets the same answers."""
    import torch

    from qlora.model import answer

    torch.manual_seed(seed)
    return answer(model, tokenizer, conversation.messages, tools=conversation.tools, **settings)
