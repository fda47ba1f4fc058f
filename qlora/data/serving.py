"""What of a tokenizer or its chat template would make a server feed other ids than were trained on."""

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
CALL_ID = "abcdefgh1"  # of the length that Mistral's templates demand
# Texts on whose leading spaces two readings of one tokenizer file may differ.
SPACED = (" Hello", "  Hello", "\n Hello")
# A thought written into an answer's content, and the answer behind it.
THOUGHT = re.compile(r"\s*<think>((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)", re.DOTALL)


class TemplateFacts:
    """What a tokenizer's chat template does, found out by rendering probes with it when it is first needed."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def check(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
        """Check that the template writes everything a conversation has.

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
        """Check that what turns say is in what was made of them, each time that a turn says it.

        A template may move a thought that begins an answer into its own marks, but not drop it, and may write no part
        of an answer as a thought that is none.

        Raises:
            DataError: A turn's text is not there.
        """
        for message in messages:
            lost = _first_lost(message, text) or _lost_once(message, messages, text)
            if lost is not None:
                raise DataError(
                    f"the chat template leaves out or changes what a turn of {message['role']} says, {lost!r:.60}; set "
                    "data.chat_template to one that writes it (the built-in chatml does)."
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
        """How a server may have the template write the prompt for an answer: as it does by default, or else with
        thinking switched on for an answer that thinks, and off for another, if it has such a switch.
        """
        if not self._switch:
            return (None,)
        thinks = "reasoning_content" in answer or THOUGHT.fullmatch(answer["content"]) is not None
        return None, thinks

    def switch(self, thinking: bool | None) -> Counter[str]:
        """The setting that a server needs for a prompt in one of :meth:`modes`, counted once; empty for the default."""
        return Counter() if thinking is None else Counter([f"{self._switch}={str(thinking).lower()}"])

    def header_of(self, span: str, before: str) -> str:
        """What a template writes in front of an answer, if an answer's span begins with it."""
        headers = [header for header in self._headers if span.startswith(header) and not before.endswith(header)]
        return max(headers, key=len, default="")

    def begins_turn(self, text: str) -> bool:
        """Whether the first control token of what is behind an answer's words opens a turn instead of ending one."""
        found = self.control_token.search(text)
        return found is not None and found[0] in self._openers

    @cached_property
    def tail(self) -> str | None:
        """What the template writes behind the words of an answer; None if it does not write a plain answer."""
        _, found, behind = self._probed([QUESTION, ANSWER | {"content": PROBE}]).rpartition(PROBE)
        return behind if found else None

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids of the tokenizer's control tokens."""
        added = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return {*self._tokenizer.all_special_ids, *added}

    @cached_property
    def control_token(self) -> re.Pattern[str]:
        """Matches the tokenizer's control tokens."""
        tokens = self._tokenizer.convert_ids_to_tokens(sorted(self.special_ids))
        return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))))

    def control_tokens(self, value: Any) -> list[str]:
        """Control tokens in a text, or in all texts of a list or an object, its keys among them."""
        if isinstance(value, str):
            return self.control_token.findall(value)
        if isinstance(value, dict):
            value = [*value, *value.values()]
        return [token for each in value for token in self.control_tokens(each)] if isinstance(value, list) else []

    def mark_control_tokens(self, value: Any) -> Any:
        """A value as in :meth:`control_tokens`, with PROBE in front of each control token."""
        if isinstance(value, str):
            return self.control_token.sub(lambda found: PROBE + found[0], value)
        if isinstance(value, dict):
            return {self.mark_control_tokens(key): self.mark_control_tokens(each) for key, each in value.items()}
        return [self.mark_control_tokens(each) for each in value] if isinstance(value, list) else value

    @cached_property
    def _openers(self) -> set[str]:
        """Control tokens that begin an answer, but end none."""
        tail = self.control_token.findall(self.tail or "")[:1]
        return {token for header in self._headers for token in self.control_token.findall(header)} - {*tail}

    @cached_property
    def _headers(self) -> list[str]:
        """What stands between a question and its answer, as the template renders it and as its prompt ends."""
        asked, probe = self._probed([QUESTION]), ANSWER | {"content": PROBE}
        found = [self._probed([QUESTION, probe]).partition(PROBE)[0], self._probed([QUESTION], True)]
        return [text[len(asked) :] for text in found if asked and len(text) > len(asked) and text.startswith(asked)]

    @cached_property
    def _switch(self) -> str | None:
        """The variable of the template that switches thinking."""
        names = re.findall(r"\b(?:" + "|".join(THINKING_SWITCHES) + r")\b", str(self._tokenizer.chat_template))
        return next((name for name in THINKING_SWITCHES if name in names), None)

    def _probed(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """A conversation as text, with a tool if the template demands one; empty if it refuses that, too."""
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
            raise ConfigError("data.chat_template: the template begins a conversation with BOS twice; take one out.")

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
            return True  # it refuses the probe for another reason; a row's own refusal tells it


def _first_lost(message: dict[str, Any], text: str) -> str | None:
    """What a turn says first that is not in a text, in its order; None if all is."""
    if message["role"] == "tool":  # templates write results as JSON, or escape them
        return None
    thoughts, words = [], message["content"]
    if message["role"] == "assistant":
        thoughts = [message.get("reasoning_content", "")]
        if thought := THOUGHT.fullmatch(words):
            thoughts, words = [*thoughts, thought[1]], thought[2]
    thoughts = [thought.strip() for thought in thoughts if thought.strip()]
    place = 0
    for number, piece in enumerate((*thoughts, *map(str.strip, parts_of(words)))):
        place = text.find(piece, place)
        is_first_thought = number == 0 and thoughts
        if place < 0 or is_first_thought and "</think>" in text[:place]:  # behind a thought that was closed
            return piece
        place += len(piece)
    return None


def _lost_once(message: dict[str, Any], messages: list[dict[str, Any]], text: str) -> str | None:
    """What a turn says, if fewer places of a text have it than turns do; None otherwise."""
    if message["role"] in ("assistant", "tool"):
        return None
    spoken = [part for other in messages for part in parts_of(other["content"])]
    pieces = filter(None, map(str.strip, parts_of(message["content"])))
    return next((piece for piece in pieces if text.count(piece) < sum(piece in part for part in spoken)), None)


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
