"""What a verb that works on a model imports, and what of it garbage collection searches."""

import inspect
import subprocess
import sys

import pytest

from qlora.cli.main import VERBS
from tests.tiny import run_config

# The callback that is registered first is called last.
CODE = """
import atexit, gc, sys
atexit.register(lambda: print("FOUND", gc.isenabled(), gc.get_freeze_count(), *sys.modules))
from qlora.cli.main import main
main()
"""
# Verbs that work without torch and transformers. The others import them by `import_libraries`, but not before they have
# checked what can be checked without, so that wrong options and configs are reported at once.
WITHOUT_MODEL = ("init", "explain", "report")
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


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_works_on_a_model_imports_its_libraries_by_one_function(verb):
    """Otherwise Python searches the objects of all libraries for garbage, as they are made and from then on."""
    source = inspect.getsource(inspect.getmodule(VERBS[verb]))
    assert ("import_libraries()" in source) == (verb not in WITHOUT_MODEL)
