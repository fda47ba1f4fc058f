"""Signals to a run: Ctrl-C and SIGTERM save and stop it after the current step, SIGUSR1 only saves it."""

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """Context in which SIGINT and SIGTERM request a stop after the current step, and SIGUSR1 a save.

    A second SIGINT or SIGTERM has its previous effect: it stops the run at once. Only the main thread receives
    signals, so the context does nothing in other threads.

    Attributes:
        signal: Signal that requested the stop; None if none did.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._stop_asked = self._save_asked = False
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
        """Whether a stop was requested."""
        return self._stop_asked or self.signal is not None

    def request_stop(self) -> None:
        """Request a stop without a signal."""
        self._stop_asked = True

    def take_save_request(self) -> bool:
        """Return whether a save was requested since the last call."""
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
