"""What a verb that works on a model imports, and what of it garbage collection searches."""

import subprocess
import sys

import pytest

from tests.tiny import run_config

# The callback that is registered first is called last.
CODE = """
import atexit, gc, sys
atexit.register(lambda: print("FOUND", gc.isenabled(), gc.get_freeze_count(), *sys.modules))
from qlora.cli.main import main
main()
"""
# Libraries that an estimate has no use for.
UNUSED = ("bitsandbytes", "datasets", "matplotlib", "pandas", "pyarrow", "sklearn")


def test_an_estimate_imports_no_more_than_it_needs(tmp_path, tiny_base):
    modules = run("estimate", run_config(tiny_base, tmp_path / "none.jsonl", tmp_path / "run"))
    assert "torch" in modules
    assert [name for name in UNUSED if name in modules] == []


@pytest.mark.slow
def test_training_imports_no_other_trainer(tmp_path, tiny_base, alpaca_file):
    modules = run("train", run_config(tiny_base, alpaca_file, tmp_path / "run", train__max_steps=1))
    assert "bitsandbytes" in modules
    assert [name for name in ("datasets", "peft", "trl") if name in modules] == []


def run(verb, config):
    """Run a verb on its own; check that it leaves the libraries' objects to the system, and return its modules."""
    done = subprocess.run([sys.executable, "-c", CODE, verb, config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "leak" not in done.stderr  # which Triton's bindings report of what is never collected
    is_enabled, num_frozen, *modules = done.stdout.rpartition("FOUND ")[2].split()
    assert is_enabled == "True"
    assert int(num_frozen) > 100_000
    return modules
