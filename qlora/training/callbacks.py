"""Callbacks of a run: user code that is called while it trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError
from qlora.model import Evaluation
from qlora.training.loop import StepReport


class StopTraining(Exception):  # noqa: N818 (not an error)
    """Raise it in a callback to end the session: the state is saved, and the result has the status `interrupted`."""


class Callback:
    """Called while a run trains; subclass it and override the methods you need.

    Of several processes, only the first calls them. :class:`StopTraining` ends the session. Any other exception ends it
    too: the state is saved first, and the exception is raised as it is. In both cases the same call of
    :func:`qlora.train` continues the run.
    """

    def on_step(self, step: int, report: StepReport) -> None:
        """Handle a finished optimizer step.

        Args:
            step: Number of steps done.
            report: Loss, metrics, gradient norm, learning rate, tokens and seconds of the step.
        """

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Handle an evaluation on the held-out examples: the first set in `data.eval`.

        Args:
            step: Number of steps done.
            evaluation: Its loss, perplexity and metrics.
        """

    def on_other_evaluation(self, step: int, name: str, evaluation: Evaluation) -> None:
        """Handle an evaluation on another set, at the same steps.

        Args:
            step: Number of steps done.
            name: `eval_NAME` for a further set of `data.eval`, `retain` for `data.retain`.
            evaluation: Its loss, perplexity and metrics.
        """

    def on_save(self, step: int, folder: Path) -> None:
        """Handle a saved checkpoint.

        Args:
            step: Number of steps done.
            folder: The checkpoint; `adapter_model.safetensors` in it is the adapter. Older ones may be removed later.
        """


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Check callbacks before anything is loaded.

    Raises:
        ConfigError: They are not a list of instances of :class:`Callback`.
    """
    if not isinstance(callbacks, list | tuple) or not all(isinstance(each, Callback) for each in callbacks):
        raise ConfigError(f"callbacks: {callbacks!r:.80} should be a list of objects of subclasses of qlora.Callback.")


def call_all(callbacks: Sequence[Callback], name: str, arguments: Sequence[Any], save: Callable[[], None]) -> bool:
    """Call a method of all callbacks in order.

    Args:
        callbacks: The callbacks.
        name: Name of the method.
        arguments: Its arguments.
        save: Saves the run's state, before an exception is raised.

    Returns:
        Whether a callback wants to stop.
    """
    is_stopped = False
    try:
        for callback in callbacks:
            try:
                getattr(callback, name)(*arguments)
            except StopTraining:
                is_stopped = True
    except BaseException:
        save()
        raise
    return is_stopped
