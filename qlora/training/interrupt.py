"""Ctrl-C and SIGTERM: the step at hand is finished and the state saved; a second one stops at once."""

import signal
from types import FrameType
from typing import Any


class Interruption:
    """While entered, takes SIGINT and SIGTERM as a wish to stop after the current step.

    Attributes:
        signal: The one that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
