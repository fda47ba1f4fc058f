"""Chat templates: which one is used, and the ids it gives. Training, generate and chat go through here."""

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlora.data.examples import parts_of
from qlora.errors import DataError

DEFAULT_TEMPLATE = "alpaca"
BUILT_IN = ("alpaca", "chatml")
# Where multimodal models keep the template that their tokenizer lacks.
PROCESSOR_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
# Variables by which templates let a server switch thinking on or off.
THINKING_SWITCHES = ("enable_thinking", "thinking", "open_thinking")
# A text that no template writes by itself.
PROBE = "qwxzk"


def apply_template(tokenizer: Any, chat_template: str) -> str:
    """Sets the tokenizer's chat template, which is saved with every adapter and model.

    Args:
        tokenizer: Of transformers; changed in place.
        chat_template: `auto` (the tokenizer's own, else that of the base's processor, else `alpaca`), a built-in name,
            or a jinja file.

    Returns:
        Which template is used, for people to read.

    Raises:
        DataError: There is no such file or name, or the processor's file is damaged.
    """
    if chat_template == "auto" and tokenizer.chat_template:
        return "the tokenizer's own"
    if chat_template == "auto":
        for path in (Path(tokenizer.name_or_path) / name for name in PROCESSOR_FILES):
            if path.is_file() and (found := _read_template(path)):
                tokenizer.chat_template = found
                return f"{path.name} of the base (the tokenizer has none)"
    name = DEFAULT_TEMPLATE if chat_template == "auto" else chat_template
    if name in BUILT_IN:
        tokenizer.chat_template = _built_in(tokenizer, name)
        return f"{name} (the tokenizer has none)" if chat_template == "auto" else name
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(("auto", *BUILT_IN))
        raise DataError(f"data.chat_template: '{name}' is neither a jinja file nor one of {known}.")
    tokenizer.chat_template = _read_template(path)
    return str(path)


def _read_template(path: Path) -> str | None:
    """The template in a jinja file, or under its key in a processor's JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} can't be read as UTF-8: {error}.") from None
    if path.name not in PROCESSOR_FILES or path.suffix != ".json":
        return text
    try:
        template = json.loads(text).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"data.chat_template: {path} is no JSON object: {error}; download it again.") from None
    if not isinstance(template, str | None):
        raise DataError(
            f"data.chat_template: {path} has several templates; save the one to use as a jinja file, and name that."
        )
    return template


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
    thinking: bool | None = None,
) -> str:
    """Renders a conversation as text.

    Args:
        tokenizer: With its template in place.
        messages: The turns, whose content is text; a template that reads parts gets the parts that it was given in.
        tools: Descriptions of the tools that may be called.
        add_generation_prompt: End with what asks for an answer.
        thinking: Switch the template's thinking on or off; by default it is as the template has it.

    Raises:
        DataError: The template refuses it; the message has its reason.
    """
    if _reads_parts(tokenizer, str(tokenizer.chat_template)):
        messages = [message | {"content": _as_parts(message["content"])} for message in messages]
    switches = {} if thinking is None else dict.fromkeys(THINKING_SWITCHES, thinking)
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **switches
        )
    except Exception as error:  # a template is a program: besides its own refusals it can fail in any way
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts_of(text)]


@lru_cache(maxsize=16)
def _reads_parts(tokenizer: Any, chat_template: str) -> bool:
    """Whether a tokenizer's template, named for the cache, writes content given as parts, and no content of text."""

    def times_written(content: Any) -> int:
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # as in render
            return 0
        return 0 if "'type'" in text else text.count(PROBE)

    return times_written(PROBE) < 2 and times_written(_as_parts(PROBE)) == 2


def encode_prompt(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Return the ids of a conversation that the model is to answer: what comes before an answer in training."""
    return tokenizer(render(tokenizer, messages, tools, add_generation_prompt=True), add_special_tokens=False).input_ids
