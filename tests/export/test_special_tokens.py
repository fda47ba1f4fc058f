"""Special tokens of a config in the run's tokenizer, the merged folder and its generation config."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import DataError
from qlora.export import merge
from qlora.model import load_run_tokenizer
from qlora.proof import verify
from qlora.training import train
from tests.tiny import run_config

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def run(tiny_base, alpaca_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("special") / "run"
    settings = {
        "data__chat_template": "chatml",
        "data__new_tokens": [START, PAD],
        "data__special_tokens": {"eos_token": END, "pad_token": PAD},
        "data__eval": None,
    }
    train(load_config(run_config(tiny_base, alpaca_file, folder, **settings)))
    return folder


def test_a_run_has_the_special_tokens_in_its_tokenizer(run):
    for tokenizer in (AutoTokenizer.from_pretrained(run / "adapter"), load_run_tokenizer(RunDirectory.open(run))):
        assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)


def test_an_interrupted_run_has_the_special_tokens(run, tiny_base, tmp_path):
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    tokenizer = load_run_tokenizer(RunDirectory(tmp_path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)


def test_a_merged_folder_ends_and_pads_with_the_special_tokens(run, tmp_path):
    merge(run, tmp_path / "out", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    assert tokenizer.eos_token_id in generation.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert verify(run, tmp_path / "out").problems == []

    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 0}))
    (problem,) = verify(run, tmp_path / "out").problems
    assert problem.startswith("generation_config.json has pad_token_id 0, not ")


def test_a_special_token_that_the_tokenizer_lacks_is_refused(tiny_base, alpaca_file, tmp_path):
    settings = {"data__special_tokens": {"pad_token": PAD}}
    config = load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", **settings))
    with pytest.raises(DataError, match="pad_token is '<pad>', which the tokenizer does not have"):
        train(config)
