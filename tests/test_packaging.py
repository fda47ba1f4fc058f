"""Dependencies in pyproject.toml, installation by setup.sh, and supported systems."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qlora
from qlora.errors import QLoRAError
from qlora.training.record import package_versions
from tests.cli import run

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTION_OF = {"yaml": "pyyaml", "PIL": "pillow"}
BROUGHT_BY_TORCH = {"triton"}
USERS_OWN = {"llama-cpp", "trackio", "vllm"}  # engines and trackers, used where they are installed


def names_of(requirements):
    return {re.split(r"[^\w-]", requirement)[0].replace("_", "-").lower() for requirement in requirements}


def imported_packages():
    """Return every third-party distribution that the package imports, with the importing modules."""
    found = {}
    for path in (ROOT / "qlora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            for module in modules:
                name = module.partition(".")[0]
                if name not in sys.stdlib_module_names and name != "qlora":
                    found[DISTRIBUTION_OF.get(name, name.replace("_", "-"))] = path.name
    return found


def test_dependencies_are_what_is_imported():
    required = names_of(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    optional = names_of(sum((extras[name] for name in ("plot", "gguf", "metrics", "images")), []))
    imported = imported_packages()
    assert imported.keys() - required - optional - BROUGHT_BY_TORCH - USERS_OWN == set()
    assert required - imported.keys() == set()


def test_the_distribution_is_never_installed_by_another_projects_name():
    assert PROJECT["name"] == "qlora-trainer"
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/**/*.sh")]
    texts = [*pages, ROOT / "pyproject.toml", *(ROOT / "qlora").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    wrong = re.compile(r"""["' ]qlora\[|pip install ["']?qlora\b""")
    assert [
        path.name for path in texts if wrong.search(path.read_text(encoding="utf-8")) and path != Path(__file__)
    ] == []


def test_the_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", qlora.__version__)
    assert package_versions()["qlora"] == qlora.__version__
    done = run("--version")
    assert (done.code, done.out) == (0, f"qlora {qlora.__version__}\n")


@pytest.mark.parametrize("system", ["win32", "cygwin"])
def test_another_system_is_refused_in_one_sentence(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    message = f"qlora runs on Linux and macOS, not on {system}; on Windows, install it in WSL 2."
    assert run("train", "no-such.yaml").error() == message
    with pytest.raises(QLoRAError, match="not on"):
        qlora.train  # noqa: B018 (the import is what is refused)


@pytest.fixture
def setup(tmp_path):
    """Run setup.sh in a checkout whose .venv only records what pip is asked for; return its output and those calls."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "PIP $PIP_CONSTRAINT: $@"\n')
    python.chmod(0o755)

    def call(*arguments, gpu=False, **variables):
        if gpu:
            (tmp_path / "bin" / "nvidia-smi").symlink_to("/bin/true")
        environment = {"PATH": str(tmp_path / "bin"), "PYTHON": sys.executable, **variables}
        command = [shutil.which("bash"), tmp_path / "scripts" / "setup.sh", *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        return output, [line.removeprefix("PIP ") for line in output.splitlines() if line.startswith("PIP ")]

    return call


INSTALL = "-m pip install --disable-pip-version-check"


def test_setup_without_a_gpu_takes_the_tested_torch_and_says_what_is_next(setup, tmp_path):
    output, calls = setup()
    assert calls == [f"{tmp_path}/.ci/constraints.txt: {INSTALL} -e .[plot]"]
    assert output.endswith("Next:\n  source .venv/bin/activate\n  qlora init\n")


def test_setup_with_a_gpu_lets_pip_choose_torch(setup):
    assert setup("test", gpu=True)[1] == [f": {INSTALL} -e .[test]"]


def test_setup_takes_torch_alone_from_its_own_index(setup):
    index = "file:///wheels"
    _, calls = setup("plot,gguf", TORCH_INDEX=index, PIP_CONSTRAINT="mine")
    assert calls == [f"mine: {INSTALL} --index-url {index} torch", f"mine: {INSTALL} -e .[plot,gguf]"]


def test_setup_names_the_python_that_is_too_old(tmp_path, setup):
    old = tmp_path / "bin" / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || exit 1\n')
    old.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as failure:
        setup(PYTHON=str(old))
    assert "needs Python 3.11 or newer" in failure.value.stderr
    assert "Python 3.9.1" in failure.value.stderr
