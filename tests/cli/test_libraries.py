"""What a verb that works on a model imports, and what of it garbage collection searches."""

import subprocess
import sys

from tests.tiny import run_config

CODE = """
import gc, sys
from qlora.cli.main import main
try:
    main()
finally:
    print("FOUND", gc.isenabled(), gc.get_freeze_count(), *sys.modules)
"""
# Libraries that an estimate has no use for.
UNUSED = ("bitsandbytes", "datasets", "matplotlib", "pandas", "pyarrow", "sklearn")


def test_an_estimate_imports_no_more_than_it_needs_and_collects_its_own_garbage_only(tmp_path, tiny_base):
    config = run_config(tiny_base, tmp_path / "none.jsonl", tmp_path / "run")
    done = subprocess.run([sys.executable, "-c", CODE, "estimate", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "leak" not in done.stderr  # which Triton's bindings report of what is never collected
    is_enabled, num_frozen, *modules = done.stdout.rpartition("FOUND ")[2].split()
    assert is_enabled == "True"
    assert int(num_frozen) > 100_000
    assert [name for name in UNUSED if name in modules] == []
