"""The Modelfile of a GGUF file: how Ollama creates a model from it, with the chat template that was trained."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.template import adds_bos, render
from qlora.errors import DataError

MODELFILE = "Modelfile"
# Texts that stand for the turns of a conversation, and conversations that a template is compared on.
SYSTEM, USER, ANSWER, NEXT = (f"⟦turn {number}⟧" for number in range(4))
COMPARED = (
    [("user", "One")],
    [("system", "Two"), ("user", "One")],
    [("user", "One"), ("assistant", "Three"), ("user", "Four")],
    [
        ("system", "Two"),
        ("user", "One"),
        ("assistant", "Three"),
        ("user", "Four"),
        ("assistant", "Five"),
        ("user", "6"),
    ],
)
NO_JINJA = "# The chat template can't be written as one of Ollama's, which has no Jinja. "
TRIMS = "# The chat template cuts spaces and line breaks around a message, which one of Ollama's can't: send none.\n"
UNKNOWN = (
    f"{NO_JINJA}Ollama takes that of the file if it\n"
    "# knows it; compare `ollama show --template` with chat_template.jinja before you rely on its answers.\n"
)
# An adapter's file has no template, and its folder no chat_template.jinja.
UNKNOWN_OF_ADAPTER = (
    f"{NO_JINJA}Ollama takes that of the base;\n"
    "# compare `ollama show --template` with the template that the adapter was trained with before you rely on its\n"
    "# answers.\n"
)


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """A chat template that puts fixed text around each turn.

    Attributes:
        without_system: Text at the start of a conversation without a system message.
        system: Text before and after a system message.
        user: Text before and after a user's message.
        assistant: Text before and after an answer; a prompt ends with the first.
    """

    without_system: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]

    @property
    def is_plain(self) -> bool:
        """Whether a Modelfile can hold its text: Ollama ends it at three quotes, and drops what is not printable."""
        text = "\n".join([self.without_system, *self.system, *self.user, *self.assistant])
        return '"""' not in text and all(character.isprintable() or character in "\t\r\n" for character in text)

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Return a conversation of roles and texts as the template of Ollama writes it."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        start = "" if turns[0][0] == "system" else self.without_system
        body = "".join(f"{around[role][0]}{text}{around[role][1]}" for role, text in turns)
        return start + body + self.assistant[0]

    def as_go(self) -> str:
        """Return the template in the language of Ollama's templates."""
        turns = [
            f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}'
            f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}"
            for role, (before, after) in (("system", self.system), ("user", self.user), ("assistant", self.assistant))
        ]
        start = f"{{{{ if not .System }}}}{_literal(self.without_system)}{{{{ end }}}}" if self.without_system else ""
        loop = f"{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{{{{ end }}}}"
        return f"{start}{loop}{_literal(self.assistant[0])}"


def _literal(text: str) -> str:
    """Return text as one of Go's templates writes it: braces that would begin an action become strings."""
    return re.sub(r"\{\{+|\{\Z", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)


def find_turns(tokenizer: Any, bos: str = "") -> TurnTemplate | None:
    """Return a tokenizer's chat template as text around turns; None if it does anything else.

    Args:
        tokenizer: Tokenizer with its template.
        bos: Text at the start of every conversation that the client adds by itself.
    """

    def rendered(turns: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return render(tokenizer, messages, add_generation_prompt=True).removeprefix(bos)

    try:
        before_user, after_user = rendered([("user", USER)]).split(USER)
        before_system, rest = rendered([("system", SYSTEM), ("user", USER)]).split(SYSTEM)
        system_to_user, _ = rest.split(USER)
        _, rest = rendered([("user", USER), ("assistant", ANSWER), ("user", NEXT)]).split(USER)
        user_to_answer, rest = rest.split(ANSWER)
        answer_to_user, _ = rest.split(NEXT)
        shared = os.path.commonprefix([text[::-1] for text in (before_user, system_to_user, answer_to_user)])[::-1]
        template = TurnTemplate(
            without_system=before_user[: len(before_user) - len(shared)],
            system=(before_system, system_to_user[: len(system_to_user) - len(shared)]),
            user=(shared, ""),
            assistant=(user_to_answer, answer_to_user[: len(answer_to_user) - len(shared)]),
        )
        is_same = user_to_answer == after_user and all(template.render(turns) == rendered(turns) for turns in COMPARED)
    except (DataError, ValueError):  # refused, or a turn that is written several times or not at all
        return None
    return template if is_same and template.is_plain else None


def _trims(tokenizer: Any) -> bool:
    """Return whether a chat template cuts the whitespace around a user's message."""
    return f" {USER} " not in render(tokenizer, [{"role": "user", "content": f" {USER} "}], add_generation_prompt=True)


def write_modelfile(file: Path, tokenizer: Any, ends: Sequence[int], adapter_for: str | None = None) -> None:
    """Write the Modelfile of a GGUF file into its folder.

    Args:
        file: The file.
        tokenizer: Tokenizer with the template that was trained.
        ends: Ids of the tokens that end an answer.
        adapter_for: Name of the base, if the file is an adapter for it.
    """
    lines = [f"FROM ./{file.name}"]
    if adapter_for is not None:
        lines = [
            f"# Replace base.gguf by a GGUF file of {adapter_for}, or by its name in Ollama.",
            "FROM ./base.gguf",
            f"ADAPTER ./{file.name}",
        ]
    template = find_turns(tokenizer, tokenizer.bos_token if adds_bos(tokenizer) else "")
    if template is None:
        lines.append((UNKNOWN if adapter_for is None else UNKNOWN_OF_ADAPTER).rstrip())
    else:
        lines += [TRIMS.rstrip()] if _trims(tokenizer) else []
        lines.append(f'TEMPLATE """{template.as_go()}"""')
    # Ollama reads what is between the quotes as it is, without escapes.
    stops = [tokenizer.decode([token_id]) for token_id in ends]
    lines += [f'PARAMETER stop """{stop}"""' if '"' in stop else f'PARAMETER stop "{stop}"' for stop in stops]
    file.with_name(MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
