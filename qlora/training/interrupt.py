"""Signals to a run: Ctrl-C and SIGTERM save and stop it after the step at hand, SIGUSR1 saves it and goes on."""

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """While entered, takes SIGINT and SIGTERM as a wish to stop after the current step, and SIGUSR1 to save then.

    A second SIGINT or SIGTERM does what it did before: it stops at once. In a thread beside the main one, which alone
    gets signals, they are left to whoever started it.

    Attributes:
        signal: The one to stop that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._save_asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request_stop)
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._request_save)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*self._previous)

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def take_save_request(self) -> bool:
        """Whether to save; each request is told once."""
        asked, self._save_asked = self._save_asked, False
        return asked

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore(signal.SIGINT, signal.SIGTERM)

    def _request_save(self, _number: int, _frame: FrameType | None) -> None:
        self._save_asked = True

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self._previous[number])
