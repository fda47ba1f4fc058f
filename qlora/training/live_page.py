"""The page of a run that is training: written again after evaluations, as long as that costs little."""

import time
from collections.abc import Callable, Sequence

from qlora.checkpoint import RunDirectory
from qlora.pages import refresh_page

# Largest share of a run's time that its page may take: reading the log of a long run again takes seconds.
MOST_TIME = 0.05


class LivePage:
    """The page of a run that is training.

    Args:
        run: Directory of the run.
        announce: Shows messages to the user.
    """

    def __init__(self, run: RunDirectory, announce: Callable[[Sequence[str]], None]) -> None:
        self._run, self._announce = run, announce
        self._due, self._has_failed = 0.0, False

    def refresh(self) -> None:
        """Write the page, unless that was done a moment ago; the first failure is shown, and none ends the run."""
        started = time.monotonic()
        if started < self._due:
            return
        problem = refresh_page(self._run)
        ended = time.monotonic()
        self._due = ended + (ended - started) / MOST_TIME
        if problem is not None and not self._has_failed:
            self._has_failed = True
            self._announce([problem])
