"""`qlora chat`: a conversation in the terminal."""

import re
import sys

from qlora.cli.generate import MaxNewTokens, Model, System, Temperature, TopP, check_sampling, load
from qlora.cli.libraries import import_libraries
from qlora.cli.options import Base, Checkpoint, Device, choose_adapter

COMMANDS = "/reset starts over, /system TEXT sets the system message and starts over, /exit or Ctrl-D ends"
COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


def chat(
    model: Model,
    checkpoint: Checkpoint = None,
    base: Base = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = None,
    device: Device = "auto",
) -> None:
    """Talk with a model: /reset, /system TEXT, and /exit or Ctrl-D to end."""
    check_sampling(temperature, top_p)
    import_libraries()

    from transformers import TextStreamer

    from qlora.data import template_name
    from qlora.data.examples import Conversation
    from qlora.data.prompts import check_prompt
    from qlora.data.serving import TemplateFacts
    from qlora.errors import DataError
    from qlora.model import answer
    from qlora.model.generate import ready_to_answer

    model = choose_adapter(model, checkpoint)
    loaded, tokenizer = load(model, base, device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    name = template_name(tokenizer) or "the tokenizer's own"
    _say(f"{model}, chat template: {name}\n{COMMANDS}")
    facts, messages = TemplateFacts(tokenizer), _start(system)
    with ready_to_answer(loaded):  # for all answers, because a large model takes seconds to get ready
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if command := COMMAND.fullmatch(line):
                verb, text = command.groups()
                if verb == "exit":
                    return
                if verb == "reset":
                    messages = _start(system)
                    _say("The conversation starts over.")
                elif verb == "system":
                    system = text
                    messages = _start(system)
                    _say("The conversation starts over, with this system message." if text else "No system message.")
                else:
                    _say(f"Unknown command /{verb}: {COMMANDS}.")
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            try:
                check_prompt(tokenizer, facts, Conversation(messages))
                text = answer(loaded, tokenizer, messages, max_new_tokens, temperature, streamer=streamer, top_p=top_p)
            except DataError as error:  # such as a template that leaves out a system message
                _say(str(error))
                messages.pop()
                continue
            except KeyboardInterrupt:
                _say("\nStopped; the question was dropped.")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": text})


def _start(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _say(text: str) -> None:
    """Print a message that is not an answer of the model, on standard error."""
    print(text, file=sys.stderr)
