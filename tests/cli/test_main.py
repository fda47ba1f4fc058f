"""The command itself: quick help, exit codes, and errors without a traceback."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from qlora.cli.examples import EXAMPLES
from qlora.cli.main import app
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError, DataError, ExportError, ModelError
from qlora.training import train
from tests.cli import run
from tests.tiny import run_config

HELP = "import sys; sys.argv = ['qlora', *sys.argv[1:]]; from qlora.cli.main import main; main()"
HEAVY = ("torch", "transformers", "datasets", "accelerate", "bitsandbytes", "safetensors", "numpy")
VERBS = ("init", "explain", "train", "eval", "generate", "chat", "merge", "verify", "doctor")


@pytest.mark.parametrize(
    ("arguments", "most"),
    [(["--help"], 400), (["--version"], 220), (["train", "--help"], 500), (["init"], 500)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_imports_little(arguments, most):
    """Startup time is import time, and the number of imports does not depend on the machine's load."""
    code = f"import sys, atexit; atexit.register(lambda: print('MODULES', *sys.modules)); {HELP}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    modules = done.stdout.rpartition("MODULES ")[2].split()
    assert "qlora.cli.main" in modules
    assert [name for name in HEAVY if name in modules] == []
    assert len(modules) < most


def test_help_names_every_verb():
    done = run("--help")
    assert done.code == 0
    assert [verb for verb in VERBS if f" {verb} " not in done.out] == []


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_verb_has_help(verb, option):
    done = run(verb, option)
    assert done.code == 0
    assert f"qlora {verb}" in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trane"], "trane"),
        (["train"], "CONFIG"),
        (["train", "a.yaml", "--resum", "x"], "--resum"),
        (["merge", "run"], "--output"),
        (["merge", "run", "-o", "x", "--dtype", "int8"], "'--dtype': 'int8' is not one of 'float16'"),
        (["merge", "run", "-o", "x", "--onto", "air"], "air"),
        (["generate", "run"], "--prompt"),
        (["generate", "run", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "run", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["eval", "run", "--batch-size", "0"], "'--batch-size': '0' should be greater than"),
        (["verify"], "RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_exits_with_2_and_names_the_mistake(arguments, message):
    done = run(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_no_verb_shows_the_help():
    done = run()
    assert done.code == 2
    assert "Usage:" in done.out
    assert [verb for verb in VERBS if f" {verb} " not in done.out] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 1), (ModelError, 1), (CheckpointError, 1), (ExportError, 1)],
)
def test_a_users_mistake_is_a_message_and_an_exit_code(monkeypatch, error, code):
    def fail(*_, **__):
        raise error("the thing, its value, the remedy")

    monkeypatch.setattr("qlora.proof.verify", fail)
    done = run("verify", "run", "folder")
    assert done.code == code
    assert done.err == "error: the thing, its value, the remedy\n"
    assert done.out == ""


def test_our_own_mistake_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("qlora.proof.verify", fail)
    with pytest.raises(ZeroDivisionError):
        run("verify", "run", "folder")


def test_in_a_shell_an_error_is_one_message_on_standard_error():
    done = subprocess.run([sys.executable, "-c", HELP, "init", "gpt9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: Unknown recipe 'gpt9'; ")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def places(tiny_base, alpaca_file, tmp_path_factory):
    """Return a config, its finished run, and a missing folder; not to be changed."""
    folder = tmp_path_factory.mktemp("places")
    config = run_config(tiny_base, alpaca_file, folder / "run", train__max_steps=1, data__eval=None)
    train(load_config(config))
    return {"config": config, "run": folder / "run", "out": folder / "out"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("verb", "target", "message"), [
    (
        ["train", "{config}"],
        "qlora.training.train",
        "Nothing was trained in this session. Run the same command to start again.",
    ),
    (["merge", "{run}", "-o", "{out}"], "qlora.training.merge", "The same command continues."),
])  # fmt: skip
def test_a_signal_outside_of_training_shows_how_to_continue(number, code, verb, target, message, places, monkeypatch):
    monkeypatch.setattr(target, lambda *_, **__: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    done = run(*(part.format(**places) for part in verb))
    assert done.code == code
    assert done.err.endswith(f"Stopped.\n{message}\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_ends_a_verb_that_has_nothing_to_continue(monkeypatch, tmp_path):
    monkeypatch.setattr("qlora.config.load_config", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    done = run("preview", tmp_path / "c.yaml")
    assert (done.code, done.err) == (143, "Stopped.\n")


def test_every_verb_has_examples_that_can_be_parsed():
    commands = typer.main.get_command(app).commands
    assert EXAMPLES.keys() == commands.keys()
    for verb, examples in EXAMPLES.items():
        for example in examples:
            program, words, arguments = example.partition(f"qlora {verb}")
            assert words, example
            commands[verb].make_context(verb, shlex.split(arguments))
        assert examples[0].split()[-1] in run(verb, "--help").out


@pytest.mark.parametrize(("words", "completed"), [("qlora ver", "verify"), ("qlora merge --upd", "--update")])
def test_verbs_and_options_are_completed(words, completed):
    environment = os.environ | {
        "_QLORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", HELP.replace("*sys.argv[1:]", "")], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == [completed]


def test_the_workflow_on_github_runs_what_ci_runs():
    root = Path(__file__).parents[2]
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["check"]["steps"]
    assert steps[-1] == {"run": "bash .ci/run"}
    assert (root / ".ci" / "run").is_file()
