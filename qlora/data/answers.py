"""The places of answers in a rendered conversation, after the prompt that a server feeds for each."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Any, TypeVar

from qlora.data.drafts import Answer, Draft
from qlora.data.examples import Conversation, PartWeights
from qlora.data.serving import ANSWER, TemplateFacts
from qlora.data.template import PROBE, render
from qlora.errors import DataError

T = TypeVar("T")

# Keys of an answer whose texts the template writes.
TEXT_KEYS = ("content", "reasoning_content", "tool_calls")


def draft_conversation(
    tokenizer: Any, facts: TemplateFacts, conversation: Conversation, loss_on: str = "assistant"
) -> list[Draft]:
    """Render a conversation and locate its supervised answers.

    Args:
        tokenizer: A tokenizer with its chat template set.
        facts: Facts about that template.
        conversation: The conversation.
        loss_on: See :class:`qlora.data.encode.ExampleEncoder`.

    Returns:
        One draft; or one per answer, if the template renders earlier turns differently when others follow.

    Raises:
        DataError: An answer can't be located, or the template leaves out part of it.
    """
    return _Drafter(tokenizer, facts, conversation, float(loss_on == "all")).draft(only_last=loss_on == "last")


class _Drafter:
    """Drafts one conversation; `base` is the weight of everything outside its answers."""

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
        wanted = [turn for turn in turns if _max_weight(self.weights[turn]) or base]
        if base:
            wanted = sorted({*wanted, *(turn for turn, weight in enumerate(self.weights) if weight != base)})
        if wanted[:1] == [0] and not base:
            raise DataError("the conversation begins with an answer, which has no prompt; remove that turn.")
        if wanted and not base:
            messages = messages[: wanted[-1] + 1]  # nothing after it is supervised
        # A template may write reasoning only if thinking is switched on.
        modes = dict.fromkeys(
            mode for turn in wanted for mode in self.facts.modes(self.messages[turn]) if mode is not False
        )
        return self._try_modes(lambda mode: self._draft_whole(messages, wanted, mode), [*modes] or [None])

    def _draft_whole(self, messages: list[dict[str, Any]], wanted: list[int], mode: bool | None) -> list[Draft]:
        """Draft the conversation in one mode of thinking, as one document or, if that is impossible, one per answer."""
        text = self._render(messages, thinking=mode)
        self.facts.check_written([message for message in messages if message["role"] != "assistant"], text)
        switched: Counter[str] = Counter()
        answers = [self._find(messages, turn, text, mode, switched) for turn in wanted]
        if all(answer or self.weights[turn] == self.base for turn, answer in zip(wanted, answers, strict=True)):
            needs_end = wanted[-1:] == [len(messages) - 1] and _max_weight(self.weights[wanted[-1]]) > 0
            found = [answer for answer in answers if answer]
            return [Draft(text, found, self.base, needs_end=needs_end, switched=switched)]
        if self.base:
            raise DataError(
                "data.loss_on: all doesn't support weights of single turns with this template, which changes earlier "
                "turns when others follow; use loss_on: assistant."
            )
        # The template changes earlier turns when others follow, as templates that drop past reasoning do. A server
        # then renders the history of each answer differently, so each answer becomes a document.
        return [self._draft_answer(turn) for turn in wanted if _max_weight(self.weights[turn])]

    def _find(
        self, messages: list[dict[str, Any]], turn: int, text: str, mode: bool | None, switched: Counter[str]
    ) -> Answer | None:
        """Locate an answer in the text of all turns; return None if the template changes the text before it."""
        is_last = turn == len(messages) - 1
        until = text if is_last else self._render(messages[: turn + 1], thinking=mode)
        if not text.startswith(until):
            return None
        if messages[turn]["role"] != "assistant":
            return self._find_masked_turn(messages, turn, until, mode)
        if not turn:  # it has no prompt, and is supervised only with loss_on: all
            return self._answer(turn, text, 0, len(until), mode)
        for thinking in self.facts.modes(messages[turn]):
            before = self._render(messages[:turn], add_generation_prompt=True, thinking=thinking)
            if until.startswith(before):
                switched.update(self.facts.switch(thinking))
                return self._answer(turn, text, len(before), len(until), mode)
        return None

    def _find_masked_turn(
        self, messages: list[dict[str, Any]], turn: int, until: str, mode: bool | None
    ) -> Answer | None:
        """Locate a masked turn that is not an answer, with `loss_on: all`; see :meth:`_find`."""
        weight = self.weights[turn]
        if isinstance(weight, PartWeights):
            raise DataError(
                f"data.loss_on: all doesn't support masks of parts of a {messages[turn]['role']} turn; mask the whole "
                "turn."
            )
        before = self._render(messages[:turn], thinking=mode) if turn else ""
        return Answer(len(before), len(until), len(until), weight) if until.startswith(before) else None

    def _draft_answer(self, turn: int) -> Draft:
        """Draft an answer as a document of its own, after the prompt that a server feeds."""
        history, answer = self.messages[:turn], self.messages[turn]

        def draft(mode: bool | None) -> Draft:
            text = self._render([*history, answer], thinking=mode)
            before = self._render(history, add_generation_prompt=True, thinking=mode)
            if not text.startswith(before):
                before, text = self._join_to_prompt(history, answer, mode)
            found = self._answer(turn, text, len(before), len(text), mode)
            return Draft(text, [found], 0.0, needs_end=True, switched=self.facts.switch(mode))

        return self._try_modes(draft, self.facts.modes(answer))

    def _try_modes(self, draft: Callable[[bool | None], T], modes: Sequence[bool | None]) -> T:
        """Return the draft in the first mode of thinking that works; raise the first error if none does."""
        errors = []
        for mode in modes:
            try:
                return draft(mode)
            except DataError as error:
                errors.append(error)
        raise errors[0]

    def _join_to_prompt(
        self, history: list[dict[str, Any]], answer: dict[str, Any], mode: bool | None
    ) -> tuple[str, str]:
        """Join an answer to the prompt that a server feeds, if the answer's own rendering changes the text before it.

        The answer is the part of its own rendering after the header that a prompt ends with. This header is searched
        between the last turn before the answer and the first character that depends on the answer's text.

        Returns:
            The prompt, and the prompt with the answer.

        Raises:
            DataError: There is no such header.
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
                "the chat template's rendering of the answer does not begin with its prompt, so the answer can't be "
                "located; set data.chat_template to chatml, or to a jinja file made for training."
            )
        return before, before + whole[place + len(header) :]

    def _answer(self, turn: int, text: str, begin: int, end: int, mode: bool | None) -> Answer:
        """Describe the answer between two characters, and locate its parts with weights of their own."""
        message, weight = self.messages[turn], self.weights[turn]
        span = text[begin:end]
        self.facts.check_written([message], span)
        control_tokens = frozenset(self._control_tokens(turn, span, end, mode))
        if turn and self.messages[turn - 1]["role"] == "assistant":
            # No server requests a second answer in a row, so the model reads its header but never writes it.
            begin += len(self.facts.header_of(span, text[:begin]))
        tail = self.facts.tail
        text_end = end - len(tail) if tail is not None and span.endswith(tail) else None
        is_unknown = text_end is None or "tool_calls" in message
        if is_unknown and self.facts.begins_turn(text[self._varying_end(turn, span, end, mode) : end]):
            raise DataError(
                "the chat template begins another turn after an answer without ending the answer, so the answer's end "
                "can't be located; set data.chat_template to chatml, or to a jinja file made for training."
            )
        if text_end is None and "tool_calls" not in message:
            text_end = self._text_end(turn, span, end, mode)
        eos = self.tokenizer.eos_token
        # Some templates end an answer only if another turn follows.
        stop = end + len(eos) if text_end is not None and text.startswith(eos, end) else end
        if not isinstance(weight, PartWeights):
            return Answer(begin, text_end, stop, weight, control_tokens=control_tokens)
        parts = []
        for key, first, last, own in weight.parts:
            whole, limit = message[key], end if text_end is None else text_end
            place, after = (
                self._part(turn, key, first, last, span, end=end, mode=mode) if whole.strip() else (limit, limit)
            )
            place, after = max(place, begin), min(after, limit)
            is_end = key == "content" and not whole[last:].strip() and after == text_end
            parts.append((place, stop if is_end else after, own))
        shown = [part for part in parts if part[0] < part[1]]
        return Answer(begin, text_end, stop, weight.rest, shown, control_tokens=control_tokens)

    def _text_end(self, turn: int, span: str, end: int, mode: bool | None) -> int | None:
        """Locate the end of an answer's content without trailing blanks; None if the template changes the content."""
        content = self.messages[turn]["content"]
        stop = len(content.rstrip())
        places = self._places(turn, {"content": content[:stop] + PROBE + content[stop:]}, span, end, mode)
        return places[-1] if places else None

    def _control_tokens(self, turn: int, span: str, end: int, mode: bool | None) -> Iterable[int]:
        """Locate the control tokens that come from an answer's data rather than from the template."""
        texts = {key: value for key, value in self.messages[turn].items() if key in TEXT_KEYS}
        if not self.facts.control_tokens(texts):
            return ()
        places = self._places(turn, self.facts.mark_control_tokens(texts), span, end, mode)
        if places is None:  # any of them may come from the data
            return (end - len(span) + found.start() for found in self.facts.control_token.finditer(span))
        return places

    def _part(
        self, turn: int, key: str, first: int, last: int, span: str, end: int, mode: bool | None
    ) -> tuple[int, int]:
        """Locate a part of an answer's content or reasoning, as if the template kept blanks around the whole.

        Raises:
            DataError: The template changes the text.
        """
        whole = self.messages[turn][key]
        # A mark before leading blanks or after trailing ones would keep a template from stripping them.
        lead, trail = len(whole) - len(whole.lstrip()), len(whole.rstrip())
        begin, stop = (min(max(border, lead), trail) for border in (first, last))
        marked = PROBE.join(whole[one:other] for one, other in pairwise([0, begin, stop, len(whole)]))
        places = self._places(turn, {key: marked}, span, end, mode)
        if places is None or len(places) != 2:
            raise DataError(
                "the chat template changes the text of an answer whose parts have weights of their own; set "
                "data.chat_template to one that keeps the text (the built-in chatml does)."
            )
        return places[0] + first - begin, places[1] + last - stop

    def _places(self, turn: int, marked: dict[str, Any], span: str, end: int, mode: bool | None) -> list[int] | None:
        """Locate marks in an answer in the document; return None if the marks change the template's output.

        Args:
            turn: Number of the answer's turn.
            marked: Values of its keys, with PROBE at each place to locate.
            span: The answer without marks, as the template writes it.
            end: End of the span in the document.
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

    def _varying_end(self, turn: int, span: str, end: int, mode: bool | None) -> int:
        """Return the first character after everything that depends on an answer's text and calls."""
        answer = self.messages[turn] | {"content": PROBE}
        if "tool_calls" in answer:
            calls = [call | {"function": {"name": PROBE, "arguments": {}}} for call in answer["tool_calls"]]
            answer |= {"content": "", "tool_calls": calls}
        try:
            other = self._render([*self.messages[:turn], answer], thinking=mode)
        except DataError:  # the template does not accept such a call
            return end
        return end - len(commonprefix([span[::-1], other[::-1]]))

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return render(self.tokenizer, messages, self.tools, **options)


def _max_weight(weight: float | PartWeights) -> float:
    return weight.max_weight if isinstance(weight, PartWeights) else weight
