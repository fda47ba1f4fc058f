"""Functions called in a process of their own: results, errors, and ends without an answer."""

import os
import signal
import sys

import pytest

from qlora.own_process import call_in_own_process


def test_a_call_runs_in_another_process():
    assert call_in_own_process(os.getpid) != os.getpid()


def test_what_it_prints_is_kept_apart_from_a_report(capfd):
    assert call_in_own_process(print, "a log line") is None
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "a log line\n"


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (os.listdir, "no-such-folder", r"^FileNotFoundError: .*no-such-folder"),
        (signal.raise_signal, signal.SIGABRT, r"killed its process \(SIGABRT\)"),
        (sys.exit, 3, "exit code 3"),
    ],
    ids=["error", "crash", "exit"],
)
def test_a_call_without_a_result_is_an_error(function, argument, message):
    with pytest.raises(ChildProcessError, match=message):
        call_in_own_process(function, argument)


def test_ctrl_c_ends_it_without_a_traceback(capfd):
    with pytest.raises(ChildProcessError, match="SIGINT"):
        call_in_own_process(signal.raise_signal, signal.SIGINT)
    assert capfd.readouterr().err == ""
