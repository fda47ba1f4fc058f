"""README and docs: links work, and configs, commands and Python run as printed, on a tiny base."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml

from qlora.cli.main import app
from qlora.config import load_config
from tests.cli import run
from tests.tiny import run_config, write_jsonl

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))
# Pages whose blocks can be followed from the first to the last.
FOLLOWED = ["README.md", "docs/chat.md", "docs/pretraining.md", "docs/new-tokens.md", "docs/release.md"]
FOLLOWED += ["docs/commands.md", "docs/python.md", "docs/continual.md", "docs/methods.md", "docs/reward.md"]
FOLLOWED += ["docs/classification.md", "docs/evaluation.md", "docs/preferences.md", "docs/question-answering.md"]
FOLLOWED += ["docs/translation.md"]
HUB_ID = re.compile(r"\b(?:meta-llama|Qwen)/[\w.-]+")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def by_name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, *languages):
    """Return language and text of the fenced blocks of a page."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [(language, text) for language, text in found if language in languages]


def anchors(path):
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_start_page():
    start = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"} <= set(
        re.findall(r"\]\((\w[\w-]*\.md)", start)
    )


def test_the_readme_is_short_and_names_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert [path.stem for path in ROOT.glob("configs/*.yaml") if f"`{path.stem}`" not in text] == []


def test_every_option_is_described():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    verbs = typer.main.get_command(app).commands
    assert [name for name in verbs if f"`qlora {name}" not in page] == []
    options = {name: [option for param in verb.params for option in param.opts] for name, verb in verbs.items()}
    missing = [(name, opt) for name, opts in options.items() for opt in opts if opt.startswith("-") and opt not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_configs_on_a_page_are_valid(page, tmp_path):
    for _, text in blocks(page, "yaml"):
        needed = {"model": {"base": "b"}, "data": {"train": "t.jsonl"}, "train": {"output_dir": "runs/r"}}
        config = needed | {name: needed.get(name, {}) | values for name, values in yaml.safe_load(text).items()}
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        assert load_config(path).train.output_dir == config["train"]["output_dir"]


def test_scripts_that_are_named_exist():
    named = {name for page in PAGES for name in re.findall(r"\bscripts/[\w/]+\.(?:sh|py)", page.read_text("utf-8"))}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert "scripts/quickstart.sh" in named


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Return the current folder of a reader who follows the docs, with the data that they name."""
    words = ("tin", "oak", "fern", "moss") * 10
    instructions = [{"instruction": f"Repeat {word}", "output": word} for word in words]
    texts = [{"text": f"The {word} grows in the {word} garden. " * 9} for word in words]
    (tmp_path / "data").mkdir()
    for name, rows in {
        "train": instructions,
        "instructions": instructions,
        "texts": texts,
        "other": texts,
        "old-task": instructions,
    }.items():
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    write_jsonl(tmp_path / "questions.jsonl", [{"prompt": "Repeat tin"}, {"instruction": "Repeat oak"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_small(config, base):
    """Rewrite a config to train a tiny base for a moment; other settings stay."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["model"]["base"] = str(base)
    settings["data"]["max_seq_len"] = 128
    settings["train"] |= {"max_steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    if "eval" in settings:
        settings["eval"] |= {"rows": 2, "max_new_tokens": 4}
    config.write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_can_be_followed(page, reader, tiny_base):
    mine, other = reader / "runs/mine", reader / "runs/other"
    if "runs/mine" in (ROOT / page).read_text(encoding="utf-8"):
        Path("runs").mkdir()
        assert run("train", run_config(tiny_base, reader / "data/train.jsonl", mine)).code == 0
    if "runs/other" in (ROOT / page).read_text(encoding="utf-8"):
        shutil.copytree(mine, other)
    rows, names = [], {}
    for language, text in blocks(ROOT / page, "json", "yaml", "bash", "python"):
        if language == "json":
            rows += map(json.loads, text.splitlines())
        elif language == "yaml" and (title := re.match(r"# ([\w-]+\.yaml)\n", text)):
            config = Path(title[1])
            config.write_text(text, encoding="utf-8")
            make_small(config, tiny_base)
            if rows:
                write_jsonl(Path(yaml.safe_load(text)["data"]["train"]), rows * 60)
                rows = []  # a later config has rows of its own
        elif language == "python":
            code = re.sub(r'(max_steps"?[=:] ?)\d+', r"\g<1>2", HUB_ID.sub(str(tiny_base), text))
            exec(compile(code, page, "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                follow(line, tiny_base)


def follow(line, base):
    """Run a command of qlora; skip others, which install or download something."""
    command = shlex.split(line, comments=True)
    if command[:1] != ["qlora"]:
        return
    outcome = run(*command[1:], stdin="Repeat tin\n/exit\n")
    assert outcome.code == 0, (line, outcome)
    if command[1] == "init" and "-o" in command:
        make_small(Path(command[command.index("-o") + 1]), base)
