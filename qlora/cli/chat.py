"""`qlora chat`: a conversation in the terminal."""

import re
import sys

from qlora.cli.generate import MaxNewTokens, Model, System, Temperature, TopP, check_sampling
from qlora.cli.options import Device

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system message and starts over, /exit or Ctrl-D ends"
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = None,
    device: Device = "auto",
) -> None:
    """Talk with a model: /reset, /system TEXT, and /exit or Ctrl-D to end."""
    check_sampling(temperature, top_p)

    from transformers import TextStreamer

    from qlora.data import template_name
    from qlora.errors import DataError
    from qlora.model import answer, load_model

    loaded, tokenizer = load_model(model, device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    _say(f"{model}, chat template: {template_name(tokenizer)}\n{COMMANDS}")
    messages = _start(system)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if command := COMMAND.fullmatch(line):
            name, text = command.groups()
            if name == "exit":
                return
            if name == "reset":
                messages = _start(system)
                _say("The conversation starts over.")
            elif name == "system":
                system = text
                messages = _start(system)
                _say("The conversation starts over, with this system message." if text else "No system message.")
            else:
                _say(f"There is no /{name}: {COMMANDS}.")
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            text = answer(loaded, tokenizer, messages, max_new_tokens, temperature, streamer=streamer, top_p=top_p)
        except DataError as error:  # of the template, which may not take a system message
            _say(str(error))
            messages.pop()
            continue
        except KeyboardInterrupt:
            _say("\nStopped; the question is forgotten.")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": text})


def _start(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _say(text: str) -> None:
    """Print what is not the model's, on standard error."""
    print(text, file=sys.stderr)
