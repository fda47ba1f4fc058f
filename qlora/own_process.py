"""Call a function in a process of its own: if it crashes, prints or keeps memory, it does so there."""

import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

# Unlike multiprocessing, this does not import the caller's script again, which would run one without a guard.
_PROGRAM = "import sys; from qlora.own_process import answer_call; answer_call(sys.argv[1])"
_STANDARD_ERROR = 2


class KilledProcessError(ChildProcessError):
    """A signal killed the process of a call."""


def call_in_own_process(function: Callable[..., Result], *args: Any) -> Result:
    """Call a function in a new process, which prints to the standard error.

    Args:
        function: A function of a module.
        args: Its arguments, which are pickled, as is its result.

    Returns:
        Its result.

    Raises:
        KilledProcessError: A signal killed the process.
        ChildProcessError: The function raised an error, which the message names with its kind, or ended the process.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        ended = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(answer)], input=pickle.dumps((function, args)), stdout=_STANDARD_ERROR
        )
        if not answer.exists():
            if ended.returncode < 0:
                raise KilledProcessError(f"a signal killed its process ({signal.Signals(-ended.returncode).name})")
            raise ChildProcessError(f"its process ended with exit code {ended.returncode}")
        error, result = pickle.loads(answer.read_bytes())
    if error:
        raise ChildProcessError(error)
    return result


def answer_call(path: str) -> None:
    """Make the call on the standard input, and write its error and result to a file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is reported by the caller, who gets it too
    function, args = pickle.load(sys.stdin.buffer)
    error, result = "", None
    try:
        result = function(*args)
    except Exception as problem:  # of any kind, from a library that is not ours
        error = f"{type(problem).__name__}: {problem}"
    Path(path).write_bytes(pickle.dumps((error, result)))
