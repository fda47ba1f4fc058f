"""Checks of tokenizer and chat template, so that a server feeds the ids that were trained on."""

import json
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.data.examples import parts_of
from qlora.data.named_templates import missing_control_tokens
from qlora.data.template import PROBE, THINKING_SWITCHES, adds_bos, render, template_name
from qlora.errors import ConfigError, DataError

QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
TOOL = {
    "type": "function",
    "function": {"name": PROBE, "description": "a", "parameters": {"type": "object", "properties": {}}},
}
CALL_ID = "abcdefgh1"  # of the length that Mistral's templates require
# Texts whose leading spaces transformers and tokenizers may tokenize differently.
SPACED = (" Hello", "  Hello", "\n Hello")
# A thought in an answer's content, and the answer after it.
THOUGHT = re.compile(r"\s*<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)", re.DOTALL)


class TemplateFacts:
    """Facts about a tokenizer's chat template, found by rendering probes with it on first use."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def check(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
        """Check that the template writes everything that a conversation has.

        Raises:
            ConfigError: The template begins with BOS twice.
            DataError: The template leaves out something that the conversation has.
        """
        self._check_bos()
        if not self._writes_text:
            raise DataError(
                "the chat template doesn't write plain text, like some templates made for images; set "
                "data.chat_template to chatml, or to a jinja file made for text."
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
                "that writes them (the built-in chatml does), or remove them from the data."
            )

    def check_written(self, messages: list[dict[str, Any]], text: str) -> None:
        """Check that a rendered text contains the content of every turn, as often as turns have it.

        A template may move a thought that begins an answer between marks of its own, but may not drop it, and may not
        turn another part of an answer into a thought.

        Raises:
            DataError: The text lacks a turn's content.
        """
        for message in messages:
            lost = _first_lost(message, text) or _lost_once(message, messages, text)
            if lost is not None:
                raise DataError(
                    f"the chat template leaves out or changes the {message['role']} turn's text, {lost!r:.60}; set "
                    "data.chat_template to one that writes it (the built-in chatml does)."
                )

    def notes(self) -> list[str]:
        """Return what a user should know about the template, a line each."""
        notes, ids = [], self._prompt_ids
        if ids is not None and adds_bos(self._tokenizer) and ids[:1] != [self._tokenizer.bos_token_id]:
            notes.append(
                "the chat template writes no BOS, although the tokenizer starts plain text with it: transformers and "
                "vLLM feed conversations without BOS, llama.cpp with it"
            )
        if re.search("strftime_now|date_string", str(self._tokenizer.chat_template)):
            notes.append("the chat template writes the current date; the data has the date on which it was tokenized")
        name = template_name(self._tokenizer)
        if name is not None and (missing := missing_control_tokens(self._tokenizer, name)):
            ends = [token for token in missing if token in (self.tail or "")]
            behind = f", and answers end with the text {' '.join(ends)} and EOS" if ends else ""
            notes.append(
                f"the tokenizer has no {', '.join(missing)}: the chat template {name} writes them as ordinary text"
                f"{behind}; to train them as tokens, set data.new_tokens: {json.dumps(missing)}"
            )
        return notes

    def modes(self, answer: dict[str, Any]) -> tuple[bool | None, ...]:
        """Return the modes in which a server may render the prompt for an answer.

        These are the default, and if the template has a switch for thinking: on for an answer that thinks, off for
        another.
        """
        if not self._switch:
            return (None,)
        thinks = "reasoning_content" in answer or THOUGHT.fullmatch(answer["content"]) is not None
        return None, thinks

    def switch(self, thinking: bool | None) -> Counter[str]:
        """Count once the setting that a server needs for a prompt in one of :meth:`modes`; empty for the default."""
        return Counter() if thinking is None else Counter([f"{self._switch}={str(thinking).lower()}"])

    def header_of(self, span: str, before: str) -> str:
        """Return the header that a template writes before an answer, if an answer's span begins with one."""
        headers = [header for header in self._headers if span.startswith(header) and not before.endswith(header)]
        return max(headers, key=len, default="")

    def begins_turn(self, text: str) -> bool:
        """Return whether the first control token after an answer's text opens a turn instead of ending one."""
        found = self.control_token.search(text)
        return found is not None and found[0] in self._openers

    @cached_property
    def tail(self) -> str | None:
        """Text that the template writes after the content of an answer; None if it refuses a plain answer."""
        _, found, behind = self._probed([QUESTION, ANSWER | {"content": PROBE}]).rpartition(PROBE)
        return behind if found else None

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids of the tokenizer's control tokens."""
        added = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return {*self._tokenizer.all_special_ids, *added}

    @cached_property
    def control_token(self) -> re.Pattern[str]:
        """Pattern that matches the tokenizer's control tokens."""
        tokens = self._tokenizer.convert_ids_to_tokens(sorted(self.special_ids))
        return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))))

    def control_tokens(self, value: Any) -> list[str]:
        """Return the control tokens in a text, or in all texts of a list or an object, including its keys."""
        if isinstance(value, str):
            return self.control_token.findall(value)
        if isinstance(value, dict):
            value = [*value, *value.values()]
        return [token for each in value for token in self.control_tokens(each)] if isinstance(value, list) else []

    def mark_control_tokens(self, value: Any) -> Any:
        """Return a value, as in :meth:`control_tokens`, with PROBE inserted before each control token."""
        if isinstance(value, str):
            return self.control_token.sub(lambda found: PROBE + found[0], value)
        if isinstance(value, dict):
            return {self.mark_control_tokens(key): self.mark_control_tokens(each) for key, each in value.items()}
        return [self.mark_control_tokens(each) for each in value] if isinstance(value, list) else value

    @cached_property
    def _openers(self) -> set[str]:
        """Control tokens that begin an answer, but don't end one."""
        tail = self.control_token.findall(self.tail or "")[:1]
        return {token for header in self._headers for token in self.control_token.findall(header)} - {*tail}

    @cached_property
    def _headers(self) -> list[str]:
        """Texts between a question and its answer: in a rendered conversation, and at the end of a prompt."""
        asked, probe = self._probed([QUESTION]), ANSWER | {"content": PROBE}
        found = [self._probed([QUESTION, probe]).partition(PROBE)[0], self._probed([QUESTION], True)]
        return [text[len(asked) :] for text in found if asked and len(text) > len(asked) and text.startswith(asked)]

    @cached_property
    def _switch(self) -> str | None:
        """Name of the template's variable that switches thinking, or None."""
        names = re.findall(r"\b(?:" + "|".join(THINKING_SWITCHES) + r")\b", str(self._tokenizer.chat_template))
        return next((name for name in THINKING_SWITCHES if name in names), None)

    def _probed(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Render a conversation, with a tool if the template requires one; return an empty text if it refuses both."""
        for tools in (None, [TOOL]):
            try:
                return render(self._tokenizer, messages, tools, add_generation_prompt)
            except DataError:
                continue
        return ""

    @cached_property
    def _prompt_ids(self) -> list[int] | None:
        text = self._probed([QUESTION], add_generation_prompt=True)
        return self._tokenizer(text, add_special_tokens=False).input_ids if text else None

    def _check_bos(self) -> None:
        bos = self._tokenizer.bos_token_id
        if bos is not None and self._prompt_ids is not None and self._prompt_ids[:2] == [bos, bos]:
            raise ConfigError("data.chat_template: the template begins a conversation with BOS twice; remove one.")

    @cached_property
    def _writes_text(self) -> bool:
        return self._writes([{"role": "user", "content": PROBE}, ANSWER])

    @cached_property
    def _writes_system(self) -> bool:
        return self._writes([{"role": "system", "content": PROBE}, QUESTION])

    @cached_property
    def _writes_tools(self) -> bool:
        return self._writes([QUESTION], [TOOL])

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
        probe = [QUESTION, ANSWER | {"reasoning_content": PROBE}]
        return any(self._writes(probe, thinking=mode) for mode in self.modes(probe[-1]))

    def _writes(self, messages: list[dict[str, Any]], tools: Any = None, thinking: bool | None = None) -> bool:
        try:
            return PROBE in render(self._tokenizer, messages, tools, thinking=thinking)
        except DataError:
            return True  # the template refuses the probe for another reason, which a row's own error will show


def _first_lost(message: dict[str, Any], text: str) -> str | None:
    """Return the first piece of a turn's content that a text lacks, in order; None if it has all."""
    if message["role"] == "tool":  # templates write results as JSON, or escape them
        return None
    thoughts, content = [], message["content"]
    if message["role"] == "assistant":
        thoughts = [message.get("reasoning_content", "")]
        if thought := THOUGHT.fullmatch(content):
            thoughts, content = [*thoughts, thought[1]], thought[2]
    thoughts = [thought.strip() for thought in thoughts if thought.strip()]
    place = 0
    for number, piece in enumerate((*thoughts, *map(str.strip, parts_of(content)))):
        place = text.find(piece, place)
        is_first_thought = number == 0 and thoughts
        if place < 0 or is_first_thought and "</think>" in text[:place]:  # after the end of another thought
            return piece
        place += len(piece)
    return None


def _lost_once(message: dict[str, Any], messages: list[dict[str, Any]], text: str) -> str | None:
    """Return a piece of a turn's content that a text has less often than the turns do; None if there is none."""
    if message["role"] in ("assistant", "tool"):
        return None
    spoken = [part for other in messages for part in parts_of(other["content"])]
    pieces = filter(None, map(str.strip, parts_of(message["content"])))
    return next((piece for piece in pieces if text.count(piece) < sum(piece in part for part in spoken)), None)


def _call(name: str) -> dict[str, Any]:
    """Return a turn that calls a function."""
    call = {"type": "function", "id": CALL_ID, "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tokenizer_notes(tokenizer: Any) -> list[str]:
    """Return a line if transformers tokenizes leading spaces differently than the tokenizer's own file says."""
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
                f"transformers tokenizes {text!r} as {here}, tokenizer.json itself (and llama.cpp) as {there}: "
                "don't begin completions or answers with a space"
            ]
    return []
