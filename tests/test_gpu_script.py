"""The script for a first GPU: a part that fails, hangs or lacks a package is written down, and the next one starts."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts.dev.bench import gpu, runs
from scripts.dev.bench.gpu import Part

PARTS = [
    Part("fine", ["-c", "print('a table')"], 60),
    Part("wrong", ["-c", "print('almost'); raise SystemExit('a reason')"], 60),
    Part("absent", ["-c", ""], 60, ("no_such_package",)),
    Part("last", ["-c", ""], 60),
]


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Return the lines of gpu.md after a run of some parts with arguments, which exits with a code."""

    def run(parts, *arguments, code=0):
        monkeypatch.setattr(gpu, "all_parts", lambda *_: iter(parts))
        monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--out", str(tmp_path), *arguments])
        if code:
            with pytest.raises(SystemExit) as exited:
                gpu.main()
            assert exited.value.code == code
        else:
            gpu.main()
        return (tmp_path / "gpu.md").read_text(encoding="utf-8").splitlines()

    return run


def test_every_part_gets_its_line_and_a_failed_one_the_end_of_its_output(lines):
    found = lines(PARTS, code=1)
    table = [line.split(" | ")[:2] for line in found if line.startswith("| ")][1:]
    assert table == [
        ["| fine", "done"],
        ["| wrong", "FAILED with exit code 1"],
        ["| absent", "skipped: no_such_package is not installed"],
        ["| last", "done"],
    ]
    start = found.index("The end of wrong:")
    assert found[start + 2 : start + 6] == ["```", "almost", "a reason", "```"]


def outcomes(found):
    return dict(line.split(" | ")[:2] for line in found if line.startswith("| ") and "| outcome |" not in line)


def test_a_base_that_fails_skips_what_needs_it(lines):
    parts = [
        Part("base", ["-c", "raise SystemExit(3)"], 60),
        Part("tests", ["-c", ""], 60),
        Part("steps", ["-c", ""], 60, uses_base=True),
    ]
    assert outcomes(lines(parts, code=1)) == {
        "| base": "FAILED with exit code 3",
        "| tests": "done",
        "| steps": "skipped: there is no base",
    }


def test_the_base_is_made_only_for_what_needs_it(lines):
    parts = [Part("base", ["-c", ""], 60), PARTS[0], Part("steps", ["-c", ""], 60, uses_base=True)]
    assert outcomes(lines(parts, "--only", "fine")) == {"| fine": "done"}
    assert outcomes(lines(parts, "--only", "steps"))["| base"] == "done"


def test_an_interrupt_ends_the_processes_of_the_part_and_keeps_the_lines_before(lines, tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    waits = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    def interrupt():
        while not pid.exists() or not pid.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        lines([PARTS[0], Part("waits", ["-c", waits], 600)])
    assert outcomes((tmp_path / "gpu.md").read_text(encoding="utf-8").splitlines()) == {"| fine": "done"}
    wait_for_the_end(pid.read_text())


def test_runs_without_a_timed_step_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["runs", "--steps", "4", "--warm-up", "4"])
    with pytest.raises(SystemExit) as exited:
        runs.main()
    assert exited.value.code == 2
    assert "--steps 4: none is timed after --warm-up 4" in capsys.readouterr().err


def test_the_error_of_a_run_stays_in_its_cell(tmp_path, monkeypatch):
    failed = runs.subprocess.CompletedProcess([], 2, stdout="", stderr="first\nauto | none")
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: failed)
    row, has_ended = runs.train(tmp_path / "run.yaml", tmp_path / "run", ["a=b"], 1)
    assert row.startswith("| a=b | failed with exit code 2: auto \\| none | ")
    assert not has_ended


def test_a_part_that_hangs_is_ended_with_the_processes_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    hangs = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    limit = 2.0
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():  # a busy machine starts it later
        outcome = gpu.run(Part("hangs", ["-c", hangs], 60), limit)
        assert outcome.status.startswith("cut off after")
        limit *= 2
        assert limit < 300
    assert outcome.output == ["started"]
    wait_for_the_end((tmp_path / "pid").read_text())


def wait_for_the_end(pid):
    deadline = time.monotonic() + 600  # it would sleep longer
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_no_part_starts_once_the_budget_is_spent(lines):
    found = lines(PARTS[:1], "--budget", str(gpu.LEAST_SECONDS - 1))
    assert any(line.startswith("| fine | skipped: the budget is spent") for line in found)


def test_only_some_parts_run_if_they_are_named(lines):
    assert [line.split(" | ")[0] for line in lines(PARTS, "--only", "last") if " | done | " in line] == ["| last"]
    with pytest.raises(SystemExit, match="unknown nothing; the parts are fine, wrong, absent, last"):
        lines(PARTS, "--only", "nothing")


def test_the_parts_come_in_an_order_that_ends_with_managed_memory(tmp_path):
    parts = list(gpu.all_parts(tmp_path / "base", tmp_path, is_tiny=False))
    names = [part.name for part in parts]
    assert names.index("tests") < names.index("train_step") < names.index("dequantize") < names.index("max_context")
    for part in parts[:-2]:
        text = " ".join(part.command)
        assert "gpu and not paged" in text or "paged" not in text.replace("--unpaged", "")
    assert all("paged" in " ".join(part.command) for part in parts[-2:])
    assert sum(part.limit for part in parts) <= 1.2 * gpu.BUDGET
    assert os.path.exists(gpu.ROOT / parts[names.index("tests")].command[7])
