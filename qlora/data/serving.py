"""What of a tokenizer or its chat template would make a server feed other ids than were trained on."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.data.template import adds_bos, render
from qlora.errors import ConfigError, DataError

PROBE = "qwxzk"
QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
CALL_ID = "abcdefgh1"  # of the length that Mistral's templates demand
# Texts on whose leading spaces two readings of one tokenizer file may differ.
SPACED = (" Hello", "  Hello", "\n Hello")


class TemplateFacts:
    """What a tokenizer's chat template does, found out by rendering probes with it when it is first needed."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def check(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
        """Sees that nothing of a conversation would be left out in silence.

        Raises:
            ConfigError: The template begins with BOS twice.
            DataError: The template does not write what the conversation has.
        """
        self._check_bos()
        if not self._writes_text:
            raise DataError(
                "the chat template writes no plain text, as some that are made for images; set data.chat_template to "
                "chatml, or to a jinja file made for text."
            )
        roles = {message["role"] for message in messages}
        keys = {key for message in messages for key in message}
        lost = [] if "system" not in roles or self._writes_system else ["system turn"]
        if tools and not self._writes_tools:
            lost.append("tools")
        if "tool_calls" in keys and not self._writes_calls:
            lost.append("tool calls")
        elif any(len(message.get("tool_calls", ())) > 1 for message in messages) and not self._writes_second_call:
            lost.append("second call of a turn")
        if "tool" in roles and not self._writes_results:
            lost.append("tool results")
        if "reasoning_content" in keys and not self._writes_reasoning:
            lost.append("reasoning")
        if lost:
            raise DataError(
                f"the chat template leaves out this conversation's {' and '.join(lost)}; set data.chat_template to one "
                "that writes them (the built-in chatml does), or take them out of the data."
            )

    def check_written(self, messages: list[dict[str, Any]], text: str) -> None:
        """Sees that what turns say is in what was made of them.

        Raises:
            DataError: A turn's text is not.
        """
        for message in messages:
            said = message["content"]
            if message["role"] == "assistant":
                said = said.rpartition("</think>")[2]  # templates may drop or move what was thought
            if message["role"] != "tool" and said.strip() not in text:
                raise DataError(
                    f"the chat template leaves out or changes what a turn of {message['role']} says, "
                    f"{said.strip()!r:.60}; set data.chat_template to one that writes it (the built-in chatml does)."
                )

    def notes(self) -> list[str]:
        """What a user should know of the template."""
        notes, ids = [], self._prompt_ids
        if ids is not None and adds_bos(self._tokenizer) and ids[:1] != [self._tokenizer.bos_token_id]:
            notes.append(
                "the chat template writes no BOS, though the tokenizer starts plain text with it: transformers and "
                "vLLM feed conversations without, llama.cpp with it"
            )
        if re.search("strftime_now|date_string", str(self._tokenizer.chat_template)):
            notes.append("the chat template writes a date: that of the day on which the data was tokenized")
        return notes

    @cached_property
    def _prompt_ids(self) -> list[int] | None:
        try:
            text = render(self._tokenizer, [QUESTION], add_generation_prompt=True)
        except DataError:
            return None
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _check_bos(self) -> None:
        bos = self._tokenizer.bos_token_id
        if bos is not None and self._prompt_ids is not None and self._prompt_ids[:2] == [bos, bos]:
            raise ConfigError("data.chat_template: the template begins a conversation with BOS twice; take one out.")

    @cached_property
    def _writes_text(self) -> bool:
        return self._writes([{"role": "user", "content": PROBE}, ANSWER])

    @cached_property
    def _writes_system(self) -> bool:
        return self._writes([{"role": "system", "content": PROBE}, QUESTION])

    @cached_property
    def _writes_tools(self) -> bool:
        function = {"name": PROBE, "description": "a", "parameters": {"type": "object", "properties": {}}}
        return self._writes([QUESTION], [{"type": "function", "function": function}])

    @cached_property
    def _writes_calls(self) -> bool:
        return self._writes([QUESTION, _call(PROBE)])

    @cached_property
    def _writes_second_call(self) -> bool:
        first, second = _call("f"), _call(PROBE)
        return self._writes([QUESTION, first | {"tool_calls": [*first["tool_calls"], *second["tool_calls"]]}])

    @cached_property
    def _writes_results(self) -> bool:
        result = {"role": "tool", "name": "f", "tool_call_id": CALL_ID, "content": PROBE}
        return self._writes([QUESTION, _call("f"), result])

    @cached_property
    def _writes_reasoning(self) -> bool:
        return self._writes([QUESTION, {"role": "assistant", "content": "a", "reasoning_content": PROBE}])

    def _writes(self, messages: list[dict[str, Any]], tools: Any = None) -> bool:
        try:
            return PROBE in render(self._tokenizer, messages, tools)
        except DataError:
            return True  # it refuses the probe for another reason; a row's own refusal tells it


def _call(name: str) -> dict[str, Any]:
    """A turn that calls a function."""
    call = {"type": "function", "id": CALL_ID, "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tokenizer_notes(tokenizer: Any) -> list[str]:
    """What a user should know of a tokenizer: where transformers reads its file otherwise than other tools do."""
    from tokenizers import Tokenizer

    path = Path(tokenizer.name_or_path) / "tokenizer.json"
    if not path.is_file():
        return []
    own = Tokenizer.from_file(str(path))
    for text in SPACED:
        here, there = (
            tokenizer(text, add_special_tokens=False).input_ids,
            own.encode(text, add_special_tokens=False).ids,
        )
        if here != there:
            return [
                f"transformers turns {text!r} into {here}, the tokenizer.json itself (and llama.cpp) into {there}: "
                "begin no completion and no answer with a space"
            ]
    return []
