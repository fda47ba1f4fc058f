"""`qlora generate`: one answer to one prompt."""

from typing import Annotated

import typer

from qlora.cli.options import AsJson, Device, expand_home

Model = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder or hub id.", callback=expand_home)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the user says.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a prompt, through the template that the model was trained with."""
    import json

    import torch

    from qlora.model import generate as run_generation
    from qlora.model import load_model

    torch.manual_seed(seed)
    loaded, tokenizer = load_model(model, device)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    answer = run_generation(loaded, tokenizer, messages, max_new_tokens, temperature)
    print(json.dumps({"prompt": prompt, "answer": answer}) if as_json else answer)
