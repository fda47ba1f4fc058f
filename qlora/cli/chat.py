"""`qlora chat`: a conversation in the terminal."""

from qlora.cli.generate import MaxNewTokens, Model, Temperature
from qlora.cli.options import Device


def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    device: Device = "auto",
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it, /new forgets what was said."""
    from transformers import TextStreamer

    from qlora.model import generate, load_model

    loaded, tokenizer = load_model(model, device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        if line == "/new":
            messages.clear()
            continue
        messages.append({"role": "user", "content": line})
        answer = generate(loaded, tokenizer, messages, max_new_tokens, temperature, streamer)
        messages.append({"role": "assistant", "content": answer})
