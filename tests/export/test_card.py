"""Model cards: values of the run's records, with the hub's front matter and without paths of this machine."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from qlora.checkpoint import RunDirectory
from qlora.export import merge
from qlora.export.card import public_name, read_license, write_card


@pytest.fixture(scope="module")
def run(merged):
    """A trained run; not to be changed."""
    return RunDirectory.open(merged / "run")


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """The merge report of the run."""
    return merge(run.path, tmp_path_factory.mktemp("card") / "out").as_dict()


def card_of(folder, run, base, report):
    write_card(folder, "my-release", run, base, report)
    return (folder / "README.md").read_text()


def test_the_card_contains_base_data_settings_losses_and_merge(run, report, tiny_base, alpaca_file, tmp_path):
    text = card_of(tmp_path, run, tiny_base, report)
    record, metrics = run.read_record(), run.read_metrics()
    assert text.split("---\n")[2].startswith("\n# my-release\n")
    assert f"{tiny_base.name}, fine-tuned with QLoRA" in text
    data = record.data[0]
    assert f"| {alpaca_file.name} | alpaca | {data['examples']} | {data['tokens']} |" in text
    assert f"{record.examples.train} documents for training, {record.examples.eval} held out" in text
    assert "rank 4, alpha 8" in text
    assert "learning rate 0.01" in text
    for line in metrics:
        if "eval_loss" in line:
            assert f"| {line['step']} | {line['eval_loss']:.4f} held-out loss |" in text
    last = [line for line in metrics if "loss" in line][-1]
    assert f"| {last['step']} | {last['loss']:.4f} training loss |" in text
    assert "| layers with an adapter | 14 |" in text
    assert "the dequantized base" in text


def test_a_bar_in_a_token_does_not_end_a_cell_and_gradients_may_be_unclipped(run, report, tiny_base, tmp_path):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    config = yaml.safe_load(copy.config.read_text())
    config["data"]["new_tokens"] = ["<|call|>"]
    config["train"]["max_grad_norm"] = None
    copy.config.write_text(json.dumps(config))
    text = card_of(tmp_path, copy, tiny_base, report)
    assert r"| new tokens | `<\|call\|>` |" in text
    assert "gradients not clipped |" in text


@pytest.mark.parametrize(("lora", "keep", "rows"), [
    ({}, None, ["| adapter | LoRA, rank 4, alpha 8, dropout 0, rsLoRA: False |", "| initial values | kaiming |"]),
    ({"kind": "dora", "init": "eva", "train": "B", "rank_pattern": {"v_proj": 2}}, None, [
        "| adapter | DoRA, rank 4, alpha 8, dropout 0, rsLoRA: False; ranks by layer: {'v_proj': 2} |",
        "| initial values | eva |", "| trained factors | B alone, on a fixed projection A |",
    ]),
    ({"kind": "rows", "alpha": 32}, None, ["| adapter | 4 rows of each weight, dropout 0 |"]),
    ({"init": "reconstruct", "calibrate": True}, None, [
        "| initial values | reconstruct, weighed by inputs of training examples |",
    ]),
    ({"layers": ["0-3", 15], "exclude": ["down_proj"]}, None, [
        "| adapted layers | all-linear in decoder layers 0-3, 15, without down_proj |",
    ]),
    ({"start_from": "/home/me/runs/first"}, None, ["| started from | first, trained further |"]),
    ({"start_from": "owner/adapter", "stack": True}, {"kl": 0.1, "null_space": "/home/me/old.jsonl"}, [
        "| started from | owner/adapter, kept below it |",
        "| kept close to the base | KL divergence from it × 0.1; no update by the main directions of the inputs from "
        "old.jsonl |",
    ]),
])  # fmt: skip
def test_the_card_says_how_the_adapter_was_made(lora, keep, rows, run, report, tiny_base, tmp_path):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    config = yaml.safe_load(copy.config.read_text())
    config["lora"] |= lora
    config["train"]["keep"] = keep
    copy.config.write_text(json.dumps(config))
    text = card_of(tmp_path, copy, tiny_base, report)
    assert [row for row in rows if row not in text] == []
    assert "/home/me" not in text
    assert ("| initial values |" in text) == (lora.get("kind") != "rows" and "started from | first" not in text)


@pytest.mark.parametrize(("train", "unit", "rows"), [
    ({}, "documents", ["| objective | sft |", "| loss on | assistant |", "of up to 128 tokens"]),
    ({"token_loss": "dft"}, "documents", ["| objective | sft, token loss dft |"]),
    ({"objective": "orpo", "preference": {"beta": 0.3}}, "pairs", [
        "| objective | orpo, beta 0.3, sft weight 1 |", "of up to 2 × 128 tokens",
    ]),
    ({"objective": "kto"}, "rated answers", [
        "| objective | kto, beta 0.1, desirable weight 1, undesirable weight 1 |",
    ]),
    ({"objective": "reward", "reward": {"center": 0.01}}, "pairs", ["| objective | reward, center 0.01 |"]),
    ({"objective": "classify", "classify_by": "head", "class_weights": "balanced"}, "documents", [
        "| objective | classify, by head, class weights balanced |",
    ]),
])  # fmt: skip
def test_the_card_says_what_was_learned(train, unit, rows, run, report, tiny_base, tmp_path):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    config = yaml.safe_load(copy.config.read_text())
    config["train"] |= train
    copy.config.write_text(json.dumps(config))
    text = card_of(tmp_path, copy, tiny_base, report)
    assert [row for row in rows if row not in text] == []
    assert ("| loss on |" in text) == ("objective" not in train)
    count = run.read_record().examples.train // (1 if unit == "documents" else 2)
    assert f"{count} {unit} for training" in text


def test_the_card_says_to_what_rank_an_adapter_was_reduced(run, report, tiny_base, tmp_path):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    with copy.metrics.open("a") as file:
        file.write(json.dumps({"step": run.step, "mean_rank": 2.5}) + "\n")
    assert "LoRA, rank 4 reduced to 2.5 on average, alpha 8" in card_of(tmp_path, copy, tiny_base, report)


def test_the_front_matter_has_the_hubs_keys(run, report, tiny_base, tmp_path):
    front = ModelCard(card_of(tmp_path, run, tiny_base, report)).data.to_dict()
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # only for a base on the hub


def test_the_card_contains_no_path_of_this_machine(run, report, tiny_base, tmp_path):
    text = card_of(tmp_path, run, tiny_base, report)
    for path in (tiny_base, run.path, tmp_path):
        assert str(path.parent) not in text
    assert not re.search(r"(?<![\w/:])/\w+/\w+", text.replace("https://", ""))


def test_a_base_and_data_from_the_hub_are_linked(run, report, tiny_base, tmp_path):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    record = copy.read_record()
    data = [{**record.data[0], "source": "owner/rows:train_sft"}]
    base = replace(record.base, name="owner/base-7B", commit="a" * 40)
    copy.write_record(replace(record, base=base, data=data))
    config = yaml.safe_load(copy.config.read_text())
    config["data"]["train"][0]["path"] = "owner/rows:train_sft"
    copy.config.write_text(json.dumps(config))
    text = card_of(tmp_path, copy, tiny_base, report)
    front = ModelCard(text).data.to_dict()
    assert (front["base_model"], front["datasets"]) == ("owner/base-7B", ["owner/rows"])
    assert "[owner/rows](https://huggingface.co/datasets/owner/rows)" in text
    assert "[owner/base-7B](https://huggingface.co/owner/base-7B), fine-tuned" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", True)),
        ("owner/name:split", ("owner/name", True)),
        ("/home/me/secret/rows.jsonl", ("rows.jsonl", False)),
        ("secret/rows.jsonl", ("rows.jsonl", False)),
        ("secret/rows.jsonl.gz", ("rows.jsonl.gz", False)),
        ("~/models/base", ("base", False)),
        ("../base", ("base", False)),
        ("a/b/c", ("c", False)),
    ],
)
def test_names_that_are_not_hub_ids_lose_their_folders(name, expected):
    assert public_name(name) == expected


def test_a_local_folder_is_not_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("owner/name") == ("name", False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"README.md": "---\nlicense: llama3.1\ntags: [a]\n---\n# Base"}, {"license": "llama3.1"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b\n---\n", "LICENSE": "MIT"},
            {"license": "other", "license_name": "own", "license_link": "https://a.b"},
        ),
        ({"README.md": "# no front matter", "LICENSE": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"README.md": "---\n: [\n---\n", "LICENSE": "  Apache License\n  Version 2.0"}, {"license": "apache-2.0"}),
        (
            {"LICENSE.txt": "Ask me first."},
            {"license": "other", "license_name": "of-the-base", "license_link": "LICENSE.txt"},
        ),
        ({"LICENSES/MIT.txt": "MIT License"}, {}),  # the licence of a part of the model, not of the whole
    ],
)
def test_the_licence_is_that_of_the_base(files, expected, tmp_path, run, report):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_license(tmp_path) == expected
    (tmp_path / "out").mkdir()
    front = ModelCard(card_of(tmp_path / "out", run, tmp_path, report)).data.to_dict()
    assert {key: front[key] for key in ("license", "license_name", "license_link") if key in front} == expected
