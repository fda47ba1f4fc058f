"""ARCHITECTURE.md describes the files that exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_every_file_has_its_line_and_every_line_its_file():
    table = PAGE[PAGE.index("## Files") :]
    named = re.findall(r"`([\w/]+\.py)`", table)
    found = {
        str(path.relative_to(ROOT / "qlora"))
        for path in (ROOT / "qlora").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "qlora"
    }
    assert sorted(named) == sorted(found)


def test_the_floors_drawn_are_the_floors_enforced():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    enforced = [set(re.findall(r"qlora\.(\w+)", layer)) for layer in contracts[0]["layers"]]
    picture = PAGE[PAGE.index("```") : PAGE.index("```", PAGE.index("```") + 3)]
    packages = {path.stem for path in (ROOT / "qlora").iterdir()}
    drawn = [packages & {cell.split()[-1] for cell in re.split(r" {3,}", line)} for line in picture.splitlines()[1:]]
    assert [names for names in drawn if names] == enforced


def test_every_module_opens_with_its_subject():
    silent = [path for path in (ROOT / "qlora").rglob("*.py") if not path.read_text(encoding="utf-8").startswith('"""')]
    assert silent == []
