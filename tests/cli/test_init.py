"""`qlora init`: what it writes, converts and refuses."""

import pytest
import yaml

from qlora.config import load_config
from tests.cli import run

THEIRS = {
    "base_model": "org/base", "sequence_len": 512, "micro_batch_size": 1, "num_epochs": 1, "adapter": "qlora",
    "datasets": [{"path": "org/rows", "type": "alpaca"}], "output_dir": "out", "wandb_project": "mine", "rl": "grpo",
}  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "axolotl.yml"
    path.write_text(yaml.safe_dump(THEIRS))
    return path


def test_a_conversion_says_whose_config_it_was_and_what_was_dropped(theirs, tmp_path):
    done = run("init", "--from", theirs, "-o", tmp_path / "mine.yaml")
    assert done.code == 0
    assert f"Converted {theirs}, a config of axolotl." in done.out
    assert "rl: grpo asks for an objective that is not available" in done.out
    assert "wandb_project: wandb and other trackers read their settings" in done.out
    assert f"Next: qlora preview {tmp_path / 'mine.yaml'}" in done.out
    config = load_config(tmp_path / "mine.yaml")
    assert (config.model.base, config.train.trackers) == ("org/base", ["wandb"])


def test_a_template_inside_a_config_is_written_next_to_the_new_one(theirs, tmp_path):
    chats = {"datasets": [{"path": "r", "type": "chat_template"}]}
    theirs.write_text(
        yaml.safe_dump(THEIRS | chats | {"chat_template": "jinja", "chat_template_jinja": "{{ messages }}"})
    )
    assert run("init", "--from", theirs, "-o", tmp_path / "mine.yaml").code == 0
    assert load_config(tmp_path / "mine.yaml").data.chat_template == str(tmp_path / "mine.jinja")
    assert (tmp_path / "mine.jinja").read_text() == "{{ messages }}"


def test_nothing_is_overwritten(theirs, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    done = run("init", "--from", theirs, "-o", tmp_path / "mine.yaml")
    assert done.code == 2
    assert "already exists" in done.error()
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["tiny", "--all"], ["--all", "--schema"], ["tiny", "--from", "x.yml"]])
def test_one_thing_is_written_at_a_time(arguments, tmp_path):
    done = run("init", *arguments, "-o", tmp_path / "out")
    assert done.code == 2
    assert "exclude each other" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_one_error(tmp_path):
    done = run("init", "--from", tmp_path / "none.yml", "-o", tmp_path / "mine.yaml")
    assert done.code == 2
    assert str(tmp_path / "none.yml") in done.error()


@pytest.mark.parametrize("verb", ["train", "preview", "estimate"])
def test_another_trainers_config_is_answered_with_the_command_that_converts_it(verb, theirs):
    done = run(verb, theirs)
    assert done.code == 2
    assert done.error() == f"{theirs} is a config of axolotl. Convert it with: qlora init --from {theirs} -o my.yaml"
