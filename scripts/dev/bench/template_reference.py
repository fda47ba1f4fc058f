"""Reference for the supervised tokens of a conversation: slow, and without any code of qlora."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

WORD = re.compile(r"[sumrctda]\d+x[a-z]?\b")
# Variables that servers pass to switch thinking.
SWITCHES = ("enable_thinking", "thinking", "open_thinking")


class WrongError(Exception):
    """The supervised tokens are not those of the reference."""


@dataclass(frozen=True)
class Turn:
    """A turn as a template gets it.

    Attributes:
        message: Turn for the template, with its content as one text.
        parts: The same content as parts, for a template that reads parts.
        words: Words that are supervised if it is an answer.
        masked: Words that are not.
        thinks: Whether it has reasoning.
    """

    message: dict[str, Any]
    parts: list[str]
    words: list[str]
    masked: list[str]
    thinks: bool

    @property
    def is_learned(self) -> bool:
        """Whether any token is supervised, also the end token of an empty answer."""
        return self.message["role"] == "assistant" and (bool(self.words) or not self.masked)


def read(row: dict[str, Any]) -> list[Turn]:
    """Return the turns of a row."""
    return [_read(turn) for turn in row["messages"]]


def _read(turn: dict[str, Any]) -> Turn:
    content = turn["content"]
    parts = [part["text"] for part in content] if isinstance(content, list) else [content]
    if isinstance(content, list) and any(len(part) > 2 for part in content):  # masks are of stretches of one text
        parts = ["".join(parts)]
    content = "\n".join(parts)
    message = {key: turn[key] for key in ("role", "tool_calls", "name", "tool_call_id") if key in turn}
    message["content"] = content
    if "reasoning_content" in turn:
        message["reasoning_content"] = turn["reasoning_content"]
    calls = "".join(call["function"]["arguments"]["key"] + " " for call in turn.get("tool_calls", ()))
    thought, words = WORD.findall(turn.get("reasoning_content", "")), WORD.findall(content + "\n" + calls)
    thinks = "reasoning_content" in turn or re.match(r"\s*<think>", content) is not None
    masked = [one for one in words if one[0] == "m"]
    return Turn(message, parts, [*thought, *(one for one in words if one[0] != "m")], masked, thinks)


def renderings(
    tokenizer: Any, turns: Sequence[Turn], tools: Any, asks: bool
) -> Iterator[tuple[tuple[bool, bool | None], str]]:
    """Return the turns as text with thinking unset, on, and off, without those that the template refuses.

    Content is passed as parts to a template that supports only parts.
    """
    for as_parts, switch in [
        (_reads_parts(tokenizer, tokenizer.chat_template), switch) for switch in (None, True, False)
    ]:
        messages = [turn.message for turn in turns]
        if as_parts:
            messages = [
                turn.message | {"content": [{"type": "text", "text": part} for part in turn.parts]} for turn in turns
            ]
        options = {} if switch is None else dict.fromkeys(SWITCHES, switch)
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=asks, **options
            )
        except Exception:  # a template is a program
            continue
        yield (as_parts, switch), text


@cache
def _reads_parts(tokenizer: Any, template: str) -> bool:
    """Return whether a tokenizer's template, named for the cache, loses content that is a text and writes parts."""
    written = []
    for content in ("a0x", [{"type": "text", "text": "a0x"}]):
        try:
            written.append(
                "a0x" in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            )
        except Exception:  # whatever it demands
            written.append(False)
    return written == [False, True]


def check(tokenizer: Any, row: dict[str, Any], documents: Sequence[tuple[list[int], list[bool]]], exact: bool) -> None:
    """Check documents against the turns that they were made of.

    Args:
        tokenizer: Tokenizer with its template set.
        row: Row with the turns.
        documents: Ids, and which of them are supervised.
        exact: Whether the tokenizer's ids decode to the text that they were made of, blanks included.

    Raises:
        WrongError: Something is lost, wrongly supervised, or not as a server feeds it.
    """
    turns, tools = read(row), row.get("tools")
    asked = [place for place, turn in enumerate(turns) if turn.is_learned]
    if len(documents) == len(asked):
        pieces = [([place], *document) for place, document in zip(asked, documents, strict=True)]
    elif len(documents) == 1:
        runs = [[place for place in run if turns[place].is_learned] for run in _runs(turns)]
        pieces = [(run, *documents[0]) for run in runs if run]
    else:
        raise WrongError(f"{len(documents)} documents for {len(asked)} answers")
    begins = [_prompt_length(tokenizer, turns, tools, run[0], ids, mask) for run, ids, mask in pieces]
    for number, (run, ids, mask) in enumerate(pieces):
        is_last = len(documents) > 1 or number + 1 == len(pieces)
        stop = len(ids) if is_last else begins[number + 1]
        if (len(documents) > 1 or not number) and any(mask[: begins[number]]):
            raise WrongError("something of a prompt is learned")
        _check_history(tokenizer, turns[: run[0]], tools, ids[: begins[number]])
        learned = [index for index in range(begins[number], stop) if mask[index]]
        stretches = _stretches(learned) if len(run) > 1 else [learned]
        if len(stretches) == len(run):
            for place, stretch in zip(run, stretches, strict=True):
                _check_answer(tokenizer, turns, tools, place, ids, stretch, begins[number], exact)
        else:
            _check_joined(tokenizer, [turns[place] for place in run], [ids[index] for index in learned])


def _runs(turns: Sequence[Turn]) -> list[list[int]]:
    """Return the indices of answers, consecutive ones together."""
    places = [place for place, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    return [[place for _, place in run] for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]


def _stretches(learned: list[int]) -> list[list[int]]:
    return [[index for _, index in run] for _, run in groupby(enumerate(learned), lambda pair: pair[1] - pair[0])]


def _prompt_length(
    tokenizer: Any, turns: Sequence[Turn], tools: Any, place: int, ids: list[int], mask: list[bool]
) -> int:
    """Return the number of ids in the prompt that a server feeds for an answer."""
    if turns[place - 1].message["role"] == "assistant":  # no server asks for it
        return mask.index(True)
    lengths = []
    for (_, switch), text in renderings(tokenizer, turns[:place], tools, asks=True):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        if ids[: len(prompt)] == prompt and switch in (None, turns[place].thinks):
            lengths.append(len(prompt))
    # Of two prompts of which one is how the other begins, the one is meant after which the answer is supervised.
    for length in lengths:
        if mask[length:][:1] == [True]:
            return length
    if lengths:
        return lengths[0]
    raise WrongError(f"turn {place}: its document does not begin with a prompt that a server feeds")


def _check_history(tokenizer: Any, turns: Sequence[Turn], tools: Any, ids: list[int]) -> None:
    """Check that system prompt, questions, results and tools are there; templates may drop past reasoning."""
    said = _squeezed(tokenizer.decode(ids))
    spoken = " ".join(word for turn in turns if turn.message["role"] != "assistant" for word in turn.words)
    described = json.dumps(tools) if tools else ""
    lost = [word for text in (spoken, described) for word in WORD.findall(text) if said.count(word) < text.count(word)]
    if lost:
        raise WrongError(f"lost from the prompt: {lost}")


def _check_joined(tokenizer: Any, turns: Sequence[Turn], ids: list[int]) -> None:
    """Check consecutive answers with only an end token between them."""
    said, rest = [_squeezed(turn.message["content"]) for turn in turns], _squeezed(tokenizer.decode(ids))
    behind = []
    for content in said:
        before, found, rest = rest.partition(content)
        if not found:
            raise WrongError(f"{content!r} is not learned")
        behind.append(before)
    if {*behind[1:]} != {rest}:
        raise WrongError(f"more than an end token is learned between answers in a row: {behind[1:]} and {rest!r}")


def _check_answer(
    tokenizer: Any, turns: Sequence[Turn], tools: Any, place: int, ids: list[int], learned: list[int], begin: int,
    exact: bool,
) -> None:  # fmt: skip
    turn = turns[place]
    is_second = turns[place - 1].message["role"] == "assistant"
    if not learned and not turn.words and _writes_nothing(tokenizer, turns[: place + 1], tools):
        return
    if not learned:
        raise WrongError(f"turn {place}: nothing of it is learned")
    if not turn.masked and not is_second and learned[0] != begin:
        raise WrongError(f"turn {place}: it is not learned from its first token")
    heard = WORD.findall(tokenizer.decode([ids[index] for index in learned]))
    if Counter(heard) != Counter(turn.words):
        raise WrongError(f"turn {place}: learned {heard} instead of {turn.words}")
    thought = _squeezed(turn.message.get("reasoning_content", ""))
    if turn.masked and thought not in _squeezed(tokenizer.decode([ids[index] for index in learned])):
        raise WrongError(f"turn {place}: its reasoning is not learned as a whole")
    is_cut = bool(turn.masked) and WORD.findall(turn.message["content"])[-1][0] == "m"
    _check_no_end_inside(tokenizer, turn, place, ids, learned)
    if not is_cut:
        _check_end(tokenizer, turns, tools, place, [ids[index] for index in learned])
    whole = tokenizer.decode(ids[learned[0] : learned[-1] + 1])
    if learned[-1] == len(ids) - 1:
        whole = whole.removesuffix(tokenizer.eos_token)  # it is added where a template has no end
    squeeze = (lambda text: text) if exact and not turn.masked else _squeezed
    for _, text in renderings(tokenizer, turns[: place + 1], tools, asks=False):
        found = squeeze(text).rfind(squeeze(whole))
        behind = squeeze(text)[found + len(squeeze(whole)) :]
        if found >= 0 and not WORD.findall(behind.replace(turn.masked[-1], "") if is_cut else behind):
            return
    raise WrongError(f"turn {place}: {whole!r} is not how the template writes it")


def _check_no_end_inside(tokenizer: Any, turn: Turn, place: int, ids: list[int], learned: list[int]) -> None:
    """Check that no end token is supervised that the data has within an answer."""
    said, end = json.dumps(turn.message, ensure_ascii=False), ids[learned[-1]]
    for token in {tokenizer.eos_token_id, end}:
        in_data = said.count(tokenizer.convert_ids_to_tokens(token))
        written = ids[learned[0] : learned[-1] + 1].count(token) - in_data
        if in_data and [ids[index] for index in learned].count(token) > max(token == end, written):
            raise WrongError(f"turn {place}: an end token inside it is learned")


def _check_end(tokenizer: Any, turns: Sequence[Turn], tools: Any, place: int, learned: list[int]) -> None:
    """Check that an answer's supervised ids have one end: a special token, or several that lead to EOS."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    eos = tokenizer.eos_token_id
    if learned[-1] not in special:
        raise WrongError(f"turn {place}: nothing ends it")
    asking = _read({"role": "user", "content": "u0x"})
    opening = next((text for _, text in renderings(tokenizer, [asking], None, asks=False)), "")
    before = tokenizer(opening.partition("u0x")[0], add_special_tokens=False).input_ids
    openers = [index for index in before if index in special and index != eos][-1:]
    token = tokenizer.convert_ids_to_tokens(learned[-1])
    ended = any(text.endswith(token) for _, text in renderings(tokenizer, turns[: place + 1], tools, asks=False))
    if learned[-1] in openers and not ended:
        raise WrongError(f"turn {place}: it ends with what begins the next turn")
    message = turns[place].message
    if "tool_calls" in message or not turns[place].words:
        return  # tags may be special tokens
    words = turns[place].words[-1]
    last = _squeezed(message["content"][message["content"].rfind(words) :])
    stop = len(learned)
    while last in _squeezed(tokenizer.decode(learned[: stop - 1])):
        stop -= 1
    behind = learned[stop:]
    first = next((number for number, index in enumerate(behind) if index in special), len(behind))
    end = behind[first:]
    if len(end) > 1 and not (end[-1] == eos and special.issuperset(end)):
        raise WrongError(f"turn {place}: {tokenizer.decode(end)!r} is learned as its end")


def _writes_nothing(tokenizer: Any, turns: Sequence[Turn], tools: Any) -> bool:
    """Return whether an empty answer is rendered as its prompt and nothing else."""
    prompts = dict(renderings(tokenizer, turns[:-1], tools, asks=True))
    return any(text == prompts.get(form) for form, text in renderings(tokenizer, turns, tools, asks=False))


def refusal_is_right(tokenizer: Any, row: dict[str, Any]) -> bool:
    """Return whether no form of the template renders a conversation whole, with each answer after its own prompt."""
    turns, tools = read(row), row.get("tools")
    if turns[0].is_learned:
        return True
    bos = tokenizer.bos_token
    if bos and all(text.startswith(bos * 2) for _, text in renderings(tokenizer, turns[:1], tools, asks=True)):
        return True
    for place in (place for place, turn in enumerate(turns) if turn.is_learned):
        prompts = dict(renderings(tokenizer, turns[:place], tools, asks=True))
        wanted = Counter(turns[place].words)
        heard = [word for turn in turns[:place] if turn.message["role"] != "assistant" for word in turn.words]
        heard += WORD.findall(json.dumps(tools)) if tools else []
        for form, text in renderings(tokenizer, turns[: place + 1], tools, asks=False):
            prompt = prompts.get(form, "")
            fits = form[1] in (None, turns[place].thinks) and prompt and text.startswith(prompt)
            answer = text[len(prompt) :]
            content = _squeezed(turns[place].message["content"])
            whole = Counter(WORD.findall(answer)) == wanted and ("think" in content or content in _squeezed(answer))
            # The template closes a thought of its own before that of the answer.
            closed = (
                turns[place].thinks and "</think>" in answer[: (WORD.search(answer) or re.search("$", answer)).start()]
            )
            if not closed and fits and whole and all(word in prompt for word in heard):
                break
        else:
            return True
    return False


def _squeezed(text: str) -> str:
    """Return a text without blanks, and without the sign for a blank that some tokenizers decode to one."""
    return re.sub(r"[\s▁]", "", text)
