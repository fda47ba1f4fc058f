"""Configs, environments and run directories as attacks: no code run, no secret shown, no file written elsewhere."""

import json
import os
import secrets
import stat

import pytest

from qlora.checkpoint import RunDirectory
from qlora.config import ModelSection, load_config
from qlora.config.plain_yaml import parse_yaml
from qlora.errors import ConfigError, DataError, ExportError, QLoRAError
from qlora.export.card import read_license
from qlora.files import write_text
from qlora.files.resumable import resumable_folder
from qlora.training.resume import check_folder
from tests.cli import run
from tests.tiny import run_config

LETTERS = "abcdefghi"
TOKEN = f"hf_{secrets.token_hex(20)}"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")


def multiplied(start, step):
    """Return YAML of nine aliases to the power of nine."""
    lines = [f"a: &a {start}"]
    lines += [f"{new}: &{new} {step.format(','.join([f'*{old}'] * 9))}" for old, new in zip(LETTERS, LETTERS[1:])]  # noqa: B905
    return "\n".join(lines)


@pytest.fixture
def config(tiny_base, alpaca_file, tmp_path):
    return run_config(tiny_base, alpaca_file, tmp_path / "run")


# Code and bombs.


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!python/object/apply:os.mknod [{marker}]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("!!python/module:os {{}}", "could not determine a constructor"),
        (multiplied("[x, x]", "[{}]"), "aliases expand to more than"),
        (multiplied("{k: 1}", "{{<<: [{}]}}"), "aliases expand to more than"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
        ("a: &a {b: {c: *a}}", "an alias refers to a value that contains it"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "9" * 9000, "4300 digits"),
        ("a: 2024-99-99", "month"),
        ("lora: {rank: 4, rank: 8}", "a key appears twice: rank"),
        ("a: " + "x" * 2_000_000, "characters"),
        ("a: \x00", "special characters"),
    ],
    ids=lambda value: value[:30],
)
def test_a_config_that_is_no_plain_text_of_values_is_refused(tmp_path, config, text, problem):
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("{marker}", str(tmp_path / "was-run")))
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "was-run").exists()
    if len(text) < 10_000 and "\n" not in text and "\0" not in text:
        with pytest.raises(ConfigError):
            load_config(config, [f"lora.rank={text.partition(': ')[2] or text}"])


def test_aliases_of_a_reasonable_size_are_values():
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: &d {x: 1}, y: 2}\nd: *d") == {
        "a": [1, 2], "b": [1, 2], "c": {"x": 1, "y": 2}, "d": {"x": 1},
    }  # fmt: skip


@pytest.mark.parametrize("value", ["${HOME}", "$HOME", "{{ 1 + 1 }}", "$(id)", "`id`", "%(x)s", "{0}"])
def test_a_value_means_what_it_says(config, value):
    assert load_config(config, [f"data.chat_template='{value}'"]).data.chat_template == value


def test_a_size_of_more_digits_than_any_number_is_refused(config):
    with pytest.raises(ConfigError, match="export.max_shard_size: .*should be a size such as 5GB"):
        load_config(config, [f"export.max_shard_size='{'9' * 400}GB'"])


@pytest.mark.parametrize(
    "key", ["model.base", "data.train", "data.chat_template", "data.cache_dir", "train.output_dir"]
)
@pytest.mark.parametrize(("value", "message"), [("", ""), ("~nobody-here/x", "home"), ("a" * 300, "too long")])
def test_a_path_that_can_be_none_is_refused_by_its_key(config, key, value, message):
    with pytest.raises(ConfigError, match=rf"{key}.*: '{value[:50]}.* .*{message}"):
        load_config(config, [f"{key}='{value}'"])


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused_by_its_key(config, value):
    with pytest.raises(ConfigError, match="train.output_dir: .* holds a character that no name"):
        load_config(config, [f"train.output_dir={json.dumps(value)}"])


def test_the_card_of_a_base_is_no_bomb(tmp_path):
    bomb = multiplied("{k: 1}", "{{<<: [{}]}}")
    (tmp_path / "README.md").write_text(f"---\n{bomb}\nlicense: other\n---\n")
    (tmp_path / "LICENSE").write_text("MIT License\n")
    assert read_license(tmp_path) == {"license": "mit"}


@pytest.mark.parametrize("script", [
    "trl sft --model_name_or_path $(touch {marker}) --dataset_name `touch {marker}`; touch {marker}",
    "X=$(touch {marker})\ntrl sft --model_name_or_path ${{X:-$(touch {marker})}} --dataset_name b | tee {marker}",
    "model_name_or_path: !!python/object/apply:os.mknod [{marker}]\ndataset_name: b",
])  # fmt: skip
def test_a_script_that_is_converted_is_not_run(tmp_path, script):
    path = tmp_path / "theirs.sh"
    path.write_text(script.format(marker=tmp_path / "was-run"))
    done = run("init", "--from", path, "-o", tmp_path / "ours.yaml")
    assert done.code in (0, 2)
    assert "Traceback" not in done.err
    assert not (tmp_path / "was-run").exists()


# Secrets.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.base", "https://me:{secret}@example.com/model"),
        ("data.train", "s3://me:{secret}@bucket/rows.jsonl"),
        ("data.train", "[{{path: 'https://me:{secret}@example.com/rows.jsonl'}}]"),
        ("data.eval", "https://:{secret}@example.com/rows.jsonl"),
        ("model.revision", "hf_{secret}"),
        ("train.trackers", "[hf_{secret}]"),
        ("data.columns", "{{text: hf_{secret}}}"),
        ("train.banana", "hf_{secret}"),
        ("hf_{secret}", "hf_{secret}"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(config, key, value):
    secret = secrets.token_hex(20)
    done = run("train", config, f"{key}={value}".format(secret=secret))
    assert done.code == 2
    assert secret not in done.error()


def test_a_section_made_in_python_holds_no_secret_either():
    with pytest.raises(ValueError, match="holds a token of the hub"):
        ModelSection(base=TOKEN)


@pytest.mark.parametrize("name", VARIABLES)
def test_an_error_shows_no_secret_of_the_environment(monkeypatch, name):
    secret = secrets.token_urlsafe(20)
    message = f"401 for https://me:pass@example.com/x with {secret} and {TOKEN}"
    assert secret in str(QLoRAError(message))
    monkeypatch.setenv(name, secret)
    assert str(QLoRAError(message)) == "401 for https://***@example.com/x with *** and ***"
    assert str(DataError(f"{message}")) == str(ExportError(QLoRAError(message)))


def test_an_error_without_secrets_is_unchanged(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a")
    message = "a@b.c: https://example.com:80/x@y is hf_short, sk-learn and ~/a@b, {'://':8,'@':9}"
    assert str(QLoRAError(message)) == message


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_what_is_written_holds_no_secret_and_has_the_modes_that_the_umask_leaves(
    config, tmp_path, monkeypatch, umask, capfd
):
    values = {name: secrets.token_hex(20) for name in VARIABLES}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:proxypassword@127.0.0.1:9")
    before, written = os.umask(umask), tmp_path / "merged"
    try:
        outcomes = [run("train", config, "--json"), run("merge", tmp_path / "run", "-o", written, "--json")]
        outcomes += [run("verify", tmp_path / "run", written, "--json"), run("doctor", "--json")]
    finally:
        os.umask(before)
    assert [done.code for done in outcomes] == [0] * 4
    texts = [*(done.out + done.err for done in outcomes), *capfd.readouterr()]
    files = files_below(tmp_path / "run") + files_below(written)
    texts += [path.read_bytes().decode("latin-1") for path in files]
    assert len(files) > 10
    for secret in (*values.values(), "proxypassword"):
        assert not any(secret in text for text in texts)
    for path in (*files, *(path for path in tmp_path.rglob("*") if path.is_dir())):
        if path.is_relative_to(tmp_path / "run") or path.is_relative_to(written):
            allowed = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) & ~allowed == 0, path


# Files elsewhere.


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl", "loss.png", "run.lock", ".run.json.new"])
def test_a_run_directory_writes_through_no_link(tmp_path, config, name):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(mine)
    with pytest.raises(ConfigError, match=rf"{name} is a link to .*mine"):
        check_folder(RunDirectory(tmp_path / "run"))
    assert run("train", config).code == 2
    assert mine.read_text() == "mine"


def test_a_text_is_not_written_through_a_link_next_to_it(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".run.json.new").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "run.json", "{}")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "run.json").read_text() == "{}"
    assert not (tmp_path / "run.json").is_symlink()


def test_a_merge_continues_in_no_folder_that_someone_else_put_there(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.merging").symlink_to("elsewhere")
    with pytest.raises(ExportError, match="created by another user"), resumable_folder(tmp_path / "out", "key"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / ".out.merging").unlink()
    (tmp_path / ".out.merging").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ExportError, match="created by another user"), resumable_folder(tmp_path / "out", "key"):
        pass
