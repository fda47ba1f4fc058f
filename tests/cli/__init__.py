"""The `qlora` command run inside the test's process, as a shell would see it."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from qlora.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """Result of a command: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Return the report, the only thing on standard output."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def error(self) -> str:
        """Return the one message, after checking that there is no traceback and nothing on standard output."""
        assert self.code in (1, 2), self
        assert self.out == ""
        assert "Traceback" not in self.err
        _, mark, message = self.err.partition("error: ")
        assert mark, self.err
        assert "error: " not in message
        return message.strip()


def run(*arguments: Any, stdin: str = "") -> Outcome:
    """Run a command. An error that `main` does not turn into a message is raised, and fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["qlora", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())
