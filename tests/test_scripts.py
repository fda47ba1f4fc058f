"""The shell scripts under real signals, and when called again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.checkpoint import RunDirectory
from tests.tiny import run_config

# Seconds, enough on a busy machine.
TIMEOUT = 600
SCRIPTS = Path(__file__).parents[1] / "scripts"
STOPS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
# Counts its signals for a moment after the first, as a run does that finishes its step.
COUNT = """
import signal, sys, time
seen = []
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: seen.append(number))
signal.signal(signal.SIGUSR1, lambda *_: print("save", flush=True))
print("ready", flush=True)
while not seen:
    signal.sigtimedwait([], 0.01)
deadline = time.monotonic() + 0.2
while time.monotonic() < deadline:
    signal.sigtimedwait([], 0.01)
print("stopped by", *map(int, seen), flush=True)
sys.exit(128 + seen[0])
"""
# A launcher as accelerate's for several GPUs, but on CPUs.
ACCELERATE = f"""#!/bin/sh
shift 3
exec {sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 "$@"
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Return a folder at the head of PATH, with this environment's python and qlora."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    write_command(folder / "qlora", f'#!/bin/sh\nexec {sys.executable} -m qlora "$@"\n')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def write_command(path, text):
    path.write_text(text)
    path.chmod(0o755)


def start(*command):
    """Start a command in its own session, as a terminal and a service manager do."""
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def send(process, number, to_group):
    """Send a signal to a script only, or to its process group."""
    (os.killpg if to_group else os.kill)(process.pid, number)


def finish(process):
    """Wait for a command to end; return its exit code and output."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def wait_for_step(process, run, step):
    """Wait until a run has logged the loss of a step."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if run.metrics.exists() and any(line["step"] >= step and "loss" in line for line in run.read_metrics()):
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"step {step} was not logged: {process.communicate()[0]}")


def start_in_turn(*commands):
    """Start commands under the scripts' forwarding of signals, each when the one before has succeeded."""
    lines = [f"source {SCRIPTS}/forward.sh", *(f"forward {command}" for command in commands)]
    return start("bash", "-c", "set -euo pipefail\n" + "\n".join(lines))


@pytest.mark.parametrize("to_group", [False, True], ids=["script", "group"])
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_reaches_the_command_once_and_nothing_follows(commands, tmp_path, number, to_group):
    (tmp_path / "count.py").write_text(COUNT)
    process = start_in_turn(f"python {tmp_path}/count.py", "echo next")
    assert process.stdout.readline() == "ready\n"
    send(process, signal.SIGUSR1, to_group)
    assert process.stdout.readline() == "save\n"
    send(process, number, to_group)
    assert finish(process) == (128 + number, f"stopped by {int(number)}\n")


@pytest.mark.parametrize("to_group", [False, True], ids=["script", "group"])
@pytest.mark.parametrize("number", STOPS)
def test_no_signal_is_lost_while_the_script_starts_its_command(commands, tmp_path, number, to_group):
    write_command(commands / "qlora", "#!/bin/sh\nsleep 2 >/dev/null 2>&1\nexit 7\n")
    for delay in (0.005, 0.01, 0.02, 0.04, 0.08):
        process = start("bash", SCRIPTS / "export.sh", tmp_path / "run", tmp_path / "merged")
        time.sleep(delay)  # the moment of the signal is tested
        send(process, number, to_group)
        assert finish(process)[0] in (-number, 128 + number), delay


def test_a_command_that_finishes_in_spite_of_a_signal_is_the_last(commands, tmp_path):
    (tmp_path / "count.py").write_text(COUNT.replace("128 + seen[0]", "0"))
    process = start_in_turn(f"python {tmp_path}/count.py", "echo next")
    assert process.stdout.readline() == "ready\n"
    send(process, signal.SIGTERM, to_group=False)
    assert finish(process) == (143, "stopped by 15\n")


def test_exit_codes_are_passed_on(commands):
    assert finish(start_in_turn("true", "echo next", "sh -c 'exit 7'", "echo last")) == (7, "next\n")
    code, output = finish(start_in_turn("no-such-command", "echo next"))
    assert (code, output) == (127, "no-such-command: No such file or directory\n")


@pytest.fixture
def recorded(commands, tmp_path):
    """Replace `qlora merge` and `qlora verify` by commands that record their arguments; return the record."""
    record = tmp_path / "arguments"
    train = f'[ "$1" != train ] || exec {sys.executable} -m qlora "$@"'
    write_command(commands / "qlora", f'#!/bin/sh\n{train}\necho "$@" >> {record}\n')

    def take():
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return lines

    return take


@pytest.mark.slow
def test_finetune_stops_continues_merges_and_continues(recorded, tiny_base, alpaca_file, tmp_path):
    """Two sessions of a run, and a third that extends it; training is real."""
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", train__save_every=1000, train__eval_every=None)
    run, merged = RunDirectory(tmp_path / "run"), tmp_path / "merged"

    def finetune(steps):
        overrides = [f"train.max_steps={steps}", "train.lr_scheduler=constant"]
        return start("bash", SCRIPTS / "finetune.sh", config, merged, *overrides)

    process = finetune(2000)
    wait_for_step(process, run, 2)
    send(process, signal.SIGINT, to_group=True)  # and SIGTERM to the script alone under a launcher, below
    code, output = finish(process)
    assert code == 128 + signal.SIGINT, output
    assert "Run interrupted." in output
    record = run.read_record()
    assert record.status == "interrupted"
    assert run.list_checkpoints()[-1] == run.checkpoint(record.steps)
    assert recorded() == []

    for steps in (record.steps + 2, record.steps + 4):
        code, output = finish(finetune(steps))
        assert code == 0, output
        assert "Run finished." in output
        assert run.read_record().steps == steps
        assert recorded() == [f"merge {run.path} -o {merged} --update", f"verify {run.path} {merged}"]


@pytest.mark.slow
def test_signals_reach_a_run_under_a_launcher(commands, tiny_base, alpaca_file, tmp_path):
    write_command(commands / "nvidia-smi", "#!/bin/sh\necho GPU 0\necho GPU 1\n")
    write_command(commands / "accelerate", ACCELERATE)
    config = run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=2000, train__eval_every=None)
    run = RunDirectory(tmp_path / "run")
    process = start("bash", SCRIPTS / "finetune.sh", config, tmp_path / "merged", "train.save_every=1000")
    wait_for_step(process, run, 2)
    send(process, signal.SIGTERM, to_group=False)
    code, output = finish(process)
    assert code == 143, output
    assert run.read_record().status == "interrupted"
    assert run.list_checkpoints() == [run.checkpoint(run.read_record().steps)]
    assert not (tmp_path / "merged").exists()


def test_export_updates_the_merge_with_the_options_given_and_verifies_it(recorded, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    code, output = finish(start("bash", SCRIPTS / "export.sh", run, f"{merged}/", "--dtype", "bfloat16"))
    assert code == 0, output
    assert recorded() == [f"merge {run} -o {merged} --update --dtype bfloat16", f"verify {run} {merged}"]


def test_export_verifies_the_adapter_and_base_that_it_merged(recorded, tmp_path):
    options = ["--checkpoint", "last", "--dtype", "bfloat16", "--base=other"]
    code, output = finish(start("bash", SCRIPTS / "export.sh", tmp_path / "run", tmp_path / "merged", *options))
    assert code == 0, output
    assert recorded()[1] == f"verify {tmp_path / 'run'} {tmp_path / 'merged'} --checkpoint last --base=other"


@pytest.mark.parametrize("option", ["--dry-run", "--replay=x"])
def test_finetune_refuses_what_trains_nothing(recorded, tmp_path, option):
    code, output = finish(start("bash", SCRIPTS / "finetune.sh", "config.yaml", tmp_path / "merged", option))
    assert code == 2, output
    assert "--dry-run and --replay train nothing" in output
    assert recorded() == []


def test_finetune_merges_the_run_that_was_trained(recorded, commands, tmp_path):
    """Even if an option's value looks like an override."""
    write_command(
        commands / "qlora",
        f"""#!/bin/sh
if [ "$1" = train ]; then echo '{{"run_dir": "runs/mine", "status": "finished"}}' > "$6"; shift $#; fi
[ $# = 0 ] || echo "$@" >> {tmp_path}/arguments
""",
    )
    resume = ["--resume", "runs/train.output_dir=b/checkpoints/step-000001"]
    code, output = finish(start("bash", SCRIPTS / "finetune.sh", "config.yaml", "merged", *resume))
    assert code == 0, output
    assert recorded() == ["merge runs/mine -o merged --update", "verify runs/mine merged"]


def test_export_leaves_a_folder_alone_that_is_no_merge(commands, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes").write_text("mine")
    write_command(commands / "qlora", "#!/bin/sh\necho refused\nexit 1\n")
    assert finish(start("bash", SCRIPTS / "export.sh", tmp_path / "run", tmp_path / "merged")) == (1, "refused\n")
    assert (tmp_path / "merged" / "notes").read_text() == "mine"


@pytest.mark.parametrize("to_group", [False, True], ids=["script", "group"])
def test_export_passes_a_signal_to_its_merge_and_verifies_nothing(commands, tmp_path, to_group):
    write_command(commands / "qlora", f"#!{sys.executable}\n{COUNT}")
    process = start("bash", SCRIPTS / "export.sh", tmp_path / "run", tmp_path / "merged")
    assert process.stdout.readline() == "ready\n"
    send(process, signal.SIGTERM, to_group)
    assert finish(process) == (143, "stopped by 15\n")
