"""The names that `import qlora` offers."""

import subprocess
import sys

import pytest

import qlora


def test_dir_lists_what_can_be_used():
    names = dir(qlora)
    assert names == sorted(names)
    assert all(getattr(qlora, name) is not None for name in names)
    verbs = {"train", "evaluate", "generate", "preview", "merge", "verify", "quantize"}
    assert verbs | {"load_config", "load_base", "add_lora", "load_run", "__version__"} <= set(names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        qlora.tarin  # noqa: B018 (the access is what fails)


def test_importing_it_loads_no_torch():
    code = "import sys, qlora; dir(qlora); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
