"""Chat templates: choose one and render conversations with it, for training, generate and chat alike."""

import json
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora.data.examples import parts_of
from qlora.data.named_templates import mark_control_tokens, read_named, template_names
from qlora.errors import DataError

DEFAULT_TEMPLATE = "alpaca"
# Files in which multimodal models keep the template that their tokenizer lacks.
PROCESSOR_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
# Variables with which a server switches thinking on or off in a template.
THINKING_SWITCHES = ("enable_thinking", "thinking", "open_thinking")
# Text that no template writes by itself.
PROBE = "qwxzk"


def apply_template(tokenizer: Any, chat_template: str) -> str:
    """Set the tokenizer's chat template, which is saved with every adapter and model.

    Args:
        tokenizer: A tokenizer of transformers; changed in place. With a template by name, the template's control
            tokens become special tokens, if the tokenizer has them.
        chat_template: `auto` (the tokenizer's own, else that of the base's processor, else `alpaca`), a name of
            :func:`qlora.data.named_templates.template_names`, or a jinja file.

    Returns:
        Which template is used, for reports.

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
    if name in template_names():
        mark_control_tokens(tokenizer, name)
        tokenizer.chat_template = _named(tokenizer, name)
        return f"{name} ({'the tokenizer has none' if chat_template == 'auto' else 'by name'})"
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(_unknown_template(name))
    tokenizer.chat_template = _read_template(path)
    return str(path)


def _unknown_template(name: str) -> str:
    """Describe a template that is neither a file nor a name, with the closest names."""
    names = ["auto", *template_names()]
    near = get_close_matches(name.lower(), names)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"data.chat_template: {name!r} is neither a jinja file nor a template's name; {hint}Names: {', '.join(names)}."
    )


def _read_template(path: Path) -> str | None:
    """Return the template in a jinja file, or under its key in a processor's JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} can't be read as UTF-8: {error}.") from None
    if path.name not in PROCESSOR_FILES or path.suffix != ".json":
        return text
    try:
        template = json.loads(text).get("chat_template")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"data.chat_template: {path} is not a JSON object: {error}; download it again.") from None
    if not isinstance(template, str | None):
        raise DataError(
            f"data.chat_template: {path} has several templates; save one as a jinja file and name that file."
        )
    return template


def template_name(tokenizer: Any) -> str | None:
    """Return the name of the tokenizer's chat template; None if it is none of those by name."""
    names = (name for name in template_names() if tokenizer.chat_template == _named(tokenizer, name))
    return next(names, None)


def _named(tokenizer: Any, name: str) -> str:
    text = read_named(name).text
    # If the tokenizer starts every text with BOS, the template does too, so that a server feeds the same ids.
    return ("{{ bos_token }}" if "bos_token" not in text and adds_bos(tokenizer) else "") + text


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer starts a plain text with BOS."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
) -> str:
    """Render a conversation as text.

    Args:
        tokenizer: A tokenizer with its template set.
        messages: The turns. Their content is text; a template that reads parts gets the parts that it was given in.
        tools: Descriptions of the tools that may be called.
        add_generation_prompt: End with the header of an answer.
        thinking: Switch the template's thinking on or off; None keeps the template's default.

    Raises:
        DataError: The template refuses the conversation; the message has its reason.
    """
    if _reads_parts(tokenizer, str(tokenizer.chat_template)):
        messages = [message | {"content": _as_parts(message["content"])} for message in messages]
    switches = {} if thinking is None else dict.fromkeys(THINKING_SWITCHES, thinking)
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **switches
        )
    except Exception as error:  # a template is a program and can fail in any way
        raise DataError(f"the chat template refuses this conversation: {error}") from error


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts_of(text)]


@lru_cache(maxsize=16)
def _reads_parts(tokenizer: Any, chat_template: str) -> bool:
    """Return whether a tokenizer's template writes content given as parts, but not as text; its text is a cache key."""

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
    """Return the ids of a conversation up to the model's answer, as they stand before an answer in training."""
    return tokenizer(render(tokenizer, messages, tools, add_generation_prompt=True), add_special_tokens=False).input_ids
