"""Call a function in a process of its own: if it crashes, prints or keeps memory, it does so there."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

# Unlike multiprocessing, this does not import the caller's script again, which would run one without a guard.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from qlora.own_process import answer_call; answer_call(sys.argv[1])"
_STANDARD_ERROR = 2


class KilledProcessError(ChildProcessError):
    """A signal killed the process of a call.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        names = {known.value: known.name for known in signal.Signals}  # which has no name for a real-time signal
        message = f"a signal killed its process ({names.get(number, number)})"
        super().__init__(message + ("; memory probably ran out" if number == signal.SIGKILL else ""))
        self.signal = number


def call_in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, which prints to the standard error.

    Args:
        function: A function of a module that can be imported.
        args: Its arguments, of JSON's types.

    Returns:
        Its result, as JSON gives it back.

    Raises:
        KilledProcessError: A signal killed the process.
        ChildProcessError: The function raised an error or returned what JSON does not have, which the message names
            with the error's kind, or it ended the process.
    """
    call = json.dumps([function.__module__, function.__qualname__, args])
    modules = [path for path in sys.path if path]  # an empty path means the current directory, which may hold anything
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        ended = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(answer), *modules],
            input=call.encode(),
            stdout=_STANDARD_ERROR,
            # As -P, which keeps the current directory off the path, but also for processes that the function starts.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        if not answer.exists():
            if ended.returncode < 0:
                raise KilledProcessError(-ended.returncode)
            raise ChildProcessError(f"its process ended with exit code {ended.returncode}")
        error, result = json.loads(answer.read_bytes())
    if error:
        raise ChildProcessError(error)
    return result


def answer_call(path: str) -> None:
    """Make the call on the standard input, write its error and result to a file, and end the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is reported by the caller, who gets it too
    module, name, args = json.load(sys.stdin)
    try:
        text = json.dumps(["", attrgetter(name)(import_module(module))(*args)])
    except Exception as problem:  # of any kind, from a library that is not ours
        text = json.dumps([f"{type(problem).__name__}: {problem}", None])
    partial = Path(path).with_suffix(".partial")
    partial.write_text(text, encoding="ascii")
    os.replace(partial, path)
    sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary end waits for all threads, and a library's may never end.
    os._exit(0)
