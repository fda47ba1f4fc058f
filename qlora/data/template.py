"""Chat templates: which one is used, and the ids it gives. Training, generate and chat go through here."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora.errors import DataError

DEFAULT_TEMPLATE = "alpaca"
BUILT_IN = ("alpaca", "chatml")


def apply_template(tokenizer: Any, chat_template: str) -> str:
    """Puts the asked-for chat template into the tokenizer, from where it is saved with every adapter and model.

    Args:
        tokenizer: Of transformers; changed in place.
        chat_template: `auto` (the tokenizer's own, else `alpaca`), a built-in name, or a jinja file.

    Returns:
        What is used, for people to read.

    Raises:
        DataError: There is no such file or name.
    """
    if chat_template == "auto" and tokenizer.chat_template:
        return "the tokenizer's own"
    name = DEFAULT_TEMPLATE if chat_template == "auto" else chat_template
    if name in BUILT_IN:
        tokenizer.chat_template = _built_in(tokenizer, name)
        return f"{name} (the tokenizer has none)" if chat_template == "auto" else name
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(("auto", *BUILT_IN))
        raise DataError(f"data.chat_template: '{name}' is neither a jinja file nor one of {known}.")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} can't be read as UTF-8: {error}.") from None
    return str(path)


def template_name(tokenizer: Any) -> str:
    """Return the name of the built-in chat template that a tokenizer has, or that it has its own."""
    names = (name for name in BUILT_IN if tokenizer.chat_template == _built_in(tokenizer, name))
    return next(names, "the tokenizer's own")


def _built_in(tokenizer: Any, name: str) -> str:
    text = files("qlora.data").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    # Where a tokenizer starts every text with BOS, so does its template; a server then feeds the same ids.
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + text


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a plain text with BOS."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text.

    Raises:
        DataError: The template refuses it; its reason is told.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: besides its own refusals it can fail in any way
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def encode_prompt(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Return the ids of a conversation that the model is to answer: what comes before an answer in training."""
    return tokenizer(render(tokenizer, messages, tools, add_generation_prompt=True), add_special_tokens=False).input_ids
