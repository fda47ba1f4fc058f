"""Output of a run on the screen: a progress line on a terminal, timestamped lines elsewhere, or nothing."""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows a run's progress and messages on standard error.

    Args:
        total_steps: Number of steps of the run.
        start_step: Step at which this session starts.
        is_shown: Whether anything is printed; otherwise messages are kept.

    Attributes:
        messages: Messages that were not printed.
    """

    def __init__(self, total_steps: int, start_step: int, is_shown: bool) -> None:
        self.messages: list[str] = []
        self._total, self._start_step, self._started = total_steps, start_step, time.monotonic()
        self._is_shown, self._console = is_shown, Console(stderr=True)
        self._bar: Progress | None = None
        if is_shown and self._console.is_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)
            self._bar.start()

    def show(self, lines: Sequence[str]) -> None:
        """Print informational lines."""
        if self._is_shown:
            for line in lines:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def announce(self, lines: Sequence[str]) -> None:
        """Print messages that a user should see, or keep them."""
        if not self._is_shown:
            self.messages += lines
        self.show(lines)

    def show_step(self, step: int, text: str) -> None:
        """Show a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.show_event(step, f"{text}  {self._left(step)}")

    def show_event(self, step: int, text: str) -> None:
        """Print an event at a step."""
        line = f"step {step:,}/{self._total:,}  {text}"
        self.show([line if self._bar is not None else f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}"])

    def close(self) -> None:
        """End the progress line."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        """Return the time left at the mean speed of this session."""
        seconds = (time.monotonic() - self._started) / max(1, step - self._start_step) * (self._total - step)
        return f"{timedelta(seconds=round(seconds))} left"
