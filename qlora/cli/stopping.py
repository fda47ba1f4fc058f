"""Ctrl-C and SIGTERM outside of a training session: a message, and exit code 130 or 143."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


class Terminated(BaseException):
    """Raised on SIGTERM; not an Exception, so that no handler of errors catches it."""


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` in the body on SIGTERM, unless a launcher started this process.

    A launcher stops its processes with SIGTERM when one of them fails. The others may wait in a collective operation,
    where Python runs no handler.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopping_with(message: str) -> Iterator[None]:
    """End the verb with a message if Ctrl-C or SIGTERM stops the body.

    Args:
        message: What to do next; the notes of the exception are printed instead if it has any.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        print("\n".join(["Stopped.", *getattr(stop, "__notes__", [message])]), file=sys.stderr)
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
