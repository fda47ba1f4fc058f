"""Arguments of a command line, from a shell script or a text file."""

import re
import shlex
from typing import Any

from qlora.config.plain_yaml import parse_yaml

ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\S+|\"[^\"]*\"|'[^']*')\s*$")
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")
FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?")
# Longest value of a variable, and longest line with the values filled in.
MAX_VALUE, MAX_LINE = 4096, 1 << 16
# Where a command ends, and the next one or a redirection begins.
ENDS = {"&&", "||", "|", ";", "&", ">", ">>", "2>&1", "<"}


def parse_command(text: str) -> tuple[str, dict[str, Any]] | None:
    """Return the program and the arguments of the command with the most arguments; None if there is none.

    Arguments before the program, as those of `accelerate launch`, are left out. Variables that the script sets to a
    plain value are filled in; nothing is run.
    """
    variables: dict[str, str] = {}
    lines: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        if assigned := ASSIGNMENT.match(line):
            variables[assigned[1]] = _fill_in(assigned[2].strip("\"'"), variables)[:MAX_VALUE]
        else:
            lines.append(_fill_in(line, variables))
    found = [command for line in lines for command in _commands(line)]
    return max(found, key=lambda command: len(command[1]), default=None)


def _fill_in(text: str, variables: dict[str, str]) -> str:
    """Return the text with the values of variables, or as it is if it would grow beyond a command line."""
    length = len(text) + sum(len(variables.get(match[1], "")) for match in VARIABLE.finditer(text))
    return text if length > MAX_LINE else VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text)


def _commands(line: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an open quote
        return []
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ENDS:
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for words in commands if (command := _command(words))]


def _command(words: list[str]) -> tuple[str, dict[str, Any]] | None:
    """Return the program and its arguments; None if the words have no arguments."""
    start = _program(words)
    program = " ".join(words[max(0, start - 1) : start + 1])
    arguments: dict[str, Any] = {}
    name = None
    for word in words[start + 1 :]:
        if FLAG.fullmatch(word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            arguments[name] = _value(value) if equals else True
        elif name is not None:
            value = _value(word)
            before = arguments[name]
            if before is True:
                arguments[name] = value
            else:
                arguments[name] = [*(before if isinstance(before, list) else [before]), value]
    return (program, arguments) if arguments else None


def _program(words: list[str]) -> int:
    """Return the index of a script, a module or a command with its verb, after which its arguments begin."""
    script = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
    if script is not None:
        return script
    if "-m" in words[:-1]:
        return words.index("-m") + 1
    return next((place for place, word in enumerate(words) if FLAG.fullmatch(word)), len(words)) - 1


def _value(word: str) -> Any:
    try:
        value = parse_yaml(word)
    except ValueError:
        return word
    return value if isinstance(value, int | float | bool | list | dict) or word.lower() in ("none", "null") else word
