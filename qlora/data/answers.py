"""Where the answers of a conversation lie in its text, behind what a server feeds before each."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Any, TypeVar

import numpy as np

from qlora.data.examples import Conversation, PartWeights
from qlora.data.serving import ANSWER, TemplateFacts
from qlora.data.template import PROBE, render
from qlora.errors import DataError

T = TypeVar("T")

# Keys of an answer whose texts the template writes.
SAID = ("content", "reasoning_content", "tool_calls")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's place in a text, in characters.

    Attributes:
        begin: Where it begins: behind the prompt.
        said: Where what it says ends: an end token is behind it. None if that is unknown.
        end: Where all that the template writes for it ends.
        weight: How much it counts.
        parts: First character, the one behind the last, and weight of what counts otherwise.
        control_tokens: Where the control tokens of its data begin.
    """

    begin: int
    said: int | None
    end: int
    weight: float
    parts: Sequence[tuple[int, int, float]] = ()
    control_tokens: frozenset[int] = frozenset()

    def token_weights(self, spans: Iterable[tuple[int, int]]) -> list[float]:
        """The weight of each of its tokens: the smallest of those of its characters."""
        characters = np.full(self.end - self.begin, self.weight)
        for begin, end, weight in self.parts:
            characters[begin - self.begin : end - self.begin] = weight
        places = ((begin - self.begin, max(end, begin + 1) - self.begin) for begin, end in spans)
        return [float(characters[begin:end].min()) for begin, end in places]

    @property
    def part_borders(self) -> list[int]:
        """Characters inside it where a part begins or ends."""
        return sorted({place for begin, end, _ in self.parts for place in (begin, end)} - {self.begin, self.end})

    @property
    def largest(self) -> float:
        """The largest weight in it: 0 if nothing of it is learned."""
        return max([self.weight, *(weight for *_, weight in self.parts)])

    @property
    def end_weight(self) -> float:
        """The weight of what ends it."""
        return next((weight for _, end, weight in reversed(self.parts) if end == self.end), self.weight)


@dataclass(slots=True)
class Draft:
    """A document before its text is tokenized.

    Attributes:
        text: All of it.
        answers: What is learned of it.
        weight: Weight of everything outside its answers.
        is_chat: Its answers end with an end token of their template.
        needs_end: Its last answer is learned, so EOS is added if it has no end token.
        starts: Ids put in front.
        switched: Answers by the switch of the template that their prompt needs, such as `enable_thinking=false`.
    """

    text: str
    answers: list[Answer]
    weight: float
    is_chat: bool = True
    needs_end: bool = False
    starts: list[int] = field(default_factory=list)
    switched: Counter[str] = field(default_factory=Counter)

    def by_answer(self) -> "list[Draft]":
        """Each of its answers that is learned as a document that ends with it."""
        return [Draft(self.text[: one.end], [one], 0.0, needs_end=True) for one in self.answers if one.largest]


def draft_conversation(
    tokenizer: Any, facts: TemplateFacts, conversation: Conversation, loss_on: str = "assistant"
) -> list[Draft]:
    """Renders a conversation and finds the answers to learn.

    Args:
        tokenizer: With its template in place.
        facts: Facts about that template.
        conversation: Its turns.
        loss_on: See :class:`qlora.data.encode.ExampleEncoder`.

    Returns:
        One draft; or one per answer, if the template renders earlier turns in another way when others follow.

    Raises:
        DataError: An answer's place can't be told, or the template leaves out something of it.
    """
    return _Drafter(tokenizer, facts, conversation, float(loss_on == "all")).draft(only_last=loss_on == "last")


class _Drafter:
    """Drafts one conversation; the base is the weight of all that is no answer."""

    def __init__(self, tokenizer: Any, facts: TemplateFacts, conversation: Conversation, base: float) -> None:
        self.tokenizer, self.facts, self.base = tokenizer, facts, base
        self.messages, self.tools = conversation.messages, conversation.tools
        self.weights = conversation.weights or [1.0] * len(self.messages)

    def draft(self, only_last: bool) -> list[Draft]:
        messages, base = self.messages, self.base
        self.facts.check(messages, self.tools)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if only_last:
            self.weights = [weight if turn in turns[-1:] else 0.0 for turn, weight in enumerate(self.weights)]
        sought = [turn for turn in turns if _largest(self.weights[turn]) or base]
        if base:
            sought = sorted({*sought, *(turn for turn, weight in enumerate(self.weights) if weight != base)})
        if sought[:1] == [0] and not base:
            raise DataError("the conversation begins with an answer, which nothing asks for; take that turn out.")
        if sought and not base:
            messages = messages[: sought[-1] + 1]  # nothing is learned from what follows
        # A template may write reasoning only where thinking is switched on.
        modes = dict.fromkeys(
            mode for turn in sought for mode in self.facts.modes(self.messages[turn]) if mode is not False
        )
        return self._first_that_works(lambda mode: self._draft_whole(messages, sought, mode), [*modes] or [None])

    def _draft_whole(self, messages: list[dict[str, Any]], sought: list[int], mode: bool | None) -> list[Draft]:
        """Drafts the conversation rendered in one mode of thinking; or its answers, if it can't be one document."""
        text = self._render(messages, thinking=mode)
        self.facts.check_written([message for message in messages if message["role"] != "assistant"], text)
        switched: Counter[str] = Counter()
        answers = [self._find(messages, turn, text, mode, switched) for turn in sought]
        if all(answer or self.weights[turn] == self.base for turn, answer in zip(sought, answers, strict=True)):
            needs_end = sought[-1:] == [len(messages) - 1] and _largest(self.weights[sought[-1]]) > 0
            found = [answer for answer in answers if answer]
            return [Draft(text, found, self.base, needs_end=needs_end, switched=switched)]
        if self.base:
            raise DataError(
                "data.loss_on: all can't weigh single turns, as the template changes earlier turns when others follow."
            )
        # The template writes earlier turns otherwise once others follow, as those that drop past reasoning do. A
        # server then asks for each answer with its own rendering of what came before, so each becomes a document.
        return [self._draft_answer(turn) for turn in sought if _largest(self.weights[turn])]

    def _find(
        self, messages: list[dict[str, Any]], turn: int, text: str, mode: bool | None, switched: Counter[str]
    ) -> Answer | None:
        """An answer's place in the text of all turns; None if the template changes what is before it."""
        is_last = turn == len(messages) - 1
        until = text if is_last else self._render(messages[: turn + 1], thinking=mode)
        if not text.startswith(until):
            return None
        if messages[turn]["role"] != "assistant":
            return self._find_masked(messages, turn, until, mode)
        if not turn:  # nothing asks for it, and it is learned only where everything is
            return self._answer(turn, text, 0, len(until), mode)
        for thinking in self.facts.modes(messages[turn]):
            before = self._render(messages[:turn], add_generation_prompt=True, thinking=thinking)
            if until.startswith(before):
                switched.update(self.facts.switch(thinking))
                return self._answer(turn, text, len(before), len(until), mode)
        return None

    def _find_masked(self, messages: list[dict[str, Any]], turn: int, until: str, mode: bool | None) -> Answer | None:
        """The place of a turn that is no answer and not learned, though everything else is; as :meth:`_find` does."""
        weight = self.weights[turn]
        if isinstance(weight, PartWeights):
            raise DataError(
                f"data.loss_on: all can't mask parts of a {messages[turn]['role']} turn; mask the whole turn."
            )
        before = self._render(messages[:turn], thinking=mode) if turn else ""
        return Answer(len(before), len(until), len(until), weight) if until.startswith(before) else None

    def _draft_answer(self, turn: int) -> Draft:
        """An answer as a document of its own, behind the prompt that a server feeds."""
        history, answer = self.messages[:turn], self.messages[turn]

        def draft(mode: bool | None) -> Draft:
            text = self._render([*history, answer], thinking=mode)
            before = self._render(history, add_generation_prompt=True, thinking=mode)
            if not text.startswith(before):
                before, text = self._behind_prompt(history, answer, mode)
            found = self._answer(turn, text, len(before), len(text), mode)
            return Draft(text, [found], 0.0, needs_end=True, switched=self.facts.switch(mode))

        return self._first_that_works(draft, self.facts.modes(answer))

    def _first_that_works(self, draft: Callable[[bool | None], T], modes: Sequence[bool | None]) -> T:
        """What is drafted in the first mode of thinking in which it can be; the first error if it can't be in any."""
        errors = []
        for mode in modes:
            try:
                return draft(mode)
            except DataError as error:
                errors.append(error)
        raise errors[0]

    def _behind_prompt(
        self, history: list[dict[str, Any]], answer: dict[str, Any], mode: bool | None
    ) -> tuple[str, str]:
        """The prompt that a server feeds, and this with the answer, whose rendering changes what is before it.

        The answer is what its own rendering has behind the header that a prompt ends with. This header is sought
        between the last turn before the answer and the first character that depends on the answer's words.

        Raises:
            DataError: No such header is there.
        """
        before = self._render(history, add_generation_prompt=True, thinking=mode)
        plain = self._render(history, thinking=mode)
        whole = self._render([*history, answer], thinking=mode)
        header = before[len(plain) :] if before.startswith(plain) else ""
        other_turn = self._render([*history[:-1], history[-1] | {"content": PROBE}, answer], thinking=mode)
        other_answer = self._render([*history, ANSWER | {"content": PROBE}], thinking=mode)
        first, last = len(commonprefix([whole, other_turn])), len(commonprefix([whole, other_answer]))
        place = whole.rfind(header, first, last) if header else -1
        if place < 0:
            raise DataError(
                "the chat template's prompt is not how its rendering of the answer begins, so the answer's place can't "
                "be told; set data.chat_template to chatml, or to a jinja file made for training."
            )
        return before, before + whole[place + len(header) :]

    def _answer(self, turn: int, text: str, begin: int, end: int, mode: bool | None) -> Answer:
        """The answer between two characters, its parts with weights of their own found."""
        message, weight = self.messages[turn], self.weights[turn]
        span = text[begin:end]
        self.facts.check_written([message], span)
        control_tokens = frozenset(self._control_tokens(turn, span, end, mode))
        if turn and self.messages[turn - 1]["role"] == "assistant":
            # No server asks for a second answer in a row, so the header is there for it to see, not to learn.
            begin += len(self.facts.header_of(span, text[:begin]))
        tail = self.facts.tail
        said = end - len(tail) if tail is not None and span.endswith(tail) else None
        is_unknown = said is None or "tool_calls" in message
        if is_unknown and self.facts.begins_turn(text[self._last_word(turn, span, end, mode) : end]):
            raise DataError(
                "the chat template begins another turn behind an answer that it has not ended, so where the answer "
                "ends can't be told; set data.chat_template to chatml, or to a jinja file made for training."
            )
        if said is None and "tool_calls" not in message:
            said = self._last_character(turn, span, end, mode)
        eos = self.tokenizer.eos_token
        # Some templates end an answer only where another turn follows.
        stop = end + len(eos) if said is not None and text.startswith(eos, end) else end
        if not isinstance(weight, PartWeights):
            return Answer(begin, said, stop, weight, (), control_tokens)
        parts = []
        for key, first, last, own in weight.parts:
            whole, limit = message[key], end if said is None else said
            place, behind = self._part(turn, key, first, last, span, end, mode) if whole.strip() else (limit, limit)
            place, behind = max(place, begin), min(behind, limit)
            is_end = key == "content" and not whole[last:].strip() and behind == said
            parts.append((place, stop if is_end else behind, own))
        return Answer(begin, said, stop, weight.rest, [part for part in parts if part[0] < part[1]], control_tokens)

    def _last_character(self, turn: int, span: str, end: int, mode: bool | None) -> int | None:
        """The character behind an answer's content, blanks not counted; None if the template changes the content."""
        content = self.messages[turn]["content"]
        stop = len(content.rstrip())
        places = self._places(turn, {"content": content[:stop] + PROBE + content[stop:]}, span, end, mode)
        return places[-1] if places else None

    def _control_tokens(self, turn: int, span: str, end: int, mode: bool | None) -> Iterable[int]:
        """Where the control tokens of an answer's data begin; those that the template writes are left out."""
        said = {key: value for key, value in self.messages[turn].items() if key in SAID}
        if not self.facts.control_tokens(said):
            return ()
        places = self._places(turn, self.facts.mark_control_tokens(said), span, end, mode)
        if places is None:  # any of them may come from the data
            return (end - len(span) + found.start() for found in self.facts.control_token.finditer(span))
        return places

    def _part(
        self, turn: int, key: str, first: int, last: int, span: str, end: int, mode: bool | None
    ) -> tuple[int, int]:
        """Where a part of an answer's content or reasoning is, or would be if blanks around the whole were kept.

        Raises:
            DataError: The template does not write it as it is.
        """
        whole = self.messages[turn][key]
        # A mark in front of blanks, or behind them, would keep a template from cutting them off.
        lead, trail = len(whole) - len(whole.lstrip()), len(whole.rstrip())
        begin, stop = (min(max(border, lead), trail) for border in (first, last))
        marked = PROBE.join(whole[one:other] for one, other in pairwise([0, begin, stop, len(whole)]))
        places = self._places(turn, {key: marked}, span, end, mode)
        if places is None or len(places) != 2:
            raise DataError(
                "the chat template changes the text of an answer whose parts have weights of their own; set "
                "data.chat_template to one that writes it as it is (the built-in chatml does)."
            )
        return places[0] + first - begin, places[1] + last - stop

    def _places(self, turn: int, marked: dict[str, Any], span: str, end: int, mode: bool | None) -> list[int] | None:
        """Where marks in an answer come out in the document; None if the template writes it otherwise with them.

        Args:
            turn: The answer's.
            marked: Values of its keys with PROBE at each place.
            span: The answer without marks, as the template writes it.
            end: Where the span ends in the document.
            mode: Whether thinking is switched on, see :func:`render`.
        """
        try:
            text = self._render([*self.messages[:turn], self.messages[turn] | marked], thinking=mode)
        except DataError:
            return None
        whole, pieces = text.replace(PROBE, ""), text.split(PROBE)
        if not whole.endswith(span):
            return None
        return [end - len(whole) + place for place in accumulate(map(len, pieces[:-1]))]

    def _last_word(self, turn: int, span: str, end: int, mode: bool | None) -> int:
        """A character behind all that depends on an answer's words and calls."""
        answer = self.messages[turn] | {"content": PROBE}
        if "tool_calls" in answer:
            calls = [call | {"function": {"name": PROBE, "arguments": {}}} for call in answer["tool_calls"]]
            answer |= {"content": "", "tool_calls": calls}
        try:
            other = self._render([*self.messages[:turn], answer], thinking=mode)
        except DataError:  # it knows no such call
            return end
        return end - len(commonprefix([span[::-1], other[::-1]]))

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return render(self.tokenizer, messages, self.tools, **options)


def _largest(weight: float | PartWeights) -> float:
    return weight.largest if isinstance(weight, PartWeights) else weight
