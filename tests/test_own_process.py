"""Functions called in a process of their own: results, errors, and ends without an answer."""

import os
import signal
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest

from qlora.own_process import KilledProcessError, call_in_own_process


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
        (set, [1], r"^TypeError: .* set is not JSON serializable"),
        (sys.exit, 3, r"^its process ended with exit code 3$"),
    ],
    ids=["error", "result", "exit"],
)
def test_a_call_without_a_result_is_an_error(function, argument, message, capfd):
    with pytest.raises(ChildProcessError, match=message):
        call_in_own_process(function, argument)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGABRT, "a signal killed its process (SIGABRT)"),
        (signal.SIGKILL, "a signal killed its process (SIGKILL); memory probably ran out"),
        (signal.SIGRTMIN + 1, f"a signal killed its process ({signal.SIGRTMIN + 1})"),
    ],
    ids=["crash", "memory", "real-time"],
)
def test_a_signal_that_kills_it_is_named(number, message):
    with pytest.raises(KilledProcessError) as caught:
        call_in_own_process(signal.raise_signal, number)
    assert str(caught.value) == message
    assert caught.value.signal == number


def test_files_of_the_current_folder_are_not_run(tmp_path, monkeypatch):
    for name in ("json", "textwrap", "qlora"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert call_in_own_process(textwrap.dedent, " a") == "a"
    its_own = f"{sys.executable} -c 'import textwrap; print(textwrap.indent(str(1), str(2)))'"
    assert call_in_own_process(subprocess.getoutput, its_own) == "21"


def test_it_finds_the_modules_that_its_caller_finds(tmp_path, monkeypatch):
    (tmp_path / "of_a_folder.py").write_text("def double(number):\n    return 2 * number\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert call_in_own_process(import_module("of_a_folder").double, 4) == 8


def test_a_thread_that_does_not_end_does_not_hold_the_caller(tmp_path, monkeypatch):
    (tmp_path / "of_a_client.py").write_text(
        "import threading\n\ndef answer():\n    threading.Thread(target=threading.Event().wait).start()\n    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert call_in_own_process(import_module("of_a_client").answer) == 5


def test_ctrl_c_ends_it_without_a_traceback(capfd):
    with pytest.raises(ChildProcessError, match="SIGINT"):
        call_in_own_process(signal.raise_signal, signal.SIGINT)
    assert capfd.readouterr().err == ""
