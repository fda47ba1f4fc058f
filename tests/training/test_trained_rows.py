"""Runs that train rows of embedding and head: reported, saved, continued, and equal on several processes."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from qlora.config import load_config
from qlora.errors import DataError
from qlora.model import answer, load_base, load_run, load_tokenizer
from qlora.training import train
from qlora.training.metrics import MetricsLog
from qlora.training.preview import preview
from tests.cli import run
from tests.tiny import SIZES, make_base, run_config, write_jsonl
from tests.training.ranks import call_in_two, needs_fork

pytestmark = pytest.mark.slow

ROWS = SIZES["vocab_size"]
TOKENS = ["<tool>", "</tool>"]
WITH_NEW = "the embedding in full, with new rows"
KINDS = {
    "new rows": {"data__new_tokens": TOKENS},
    "in full": {"lora__modules_to_save": ["embed_tokens", "lm_head"]},
    WITH_NEW: {"lora__modules_to_save": ["embed_tokens"], "data__new_tokens": TOKENS},
}


@pytest.fixture(scope="module")
def tool_file(tmp_path_factory):
    rows = [
        {"instruction": f"Call {word} {count}", "output": f"<tool>{word} {count}</tool>"}
        for word in ("tin", "oak", "fern", "moss")
        for count in range(1, 11)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "tools.jsonl", rows)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "tied", seed=5, tie_word_embeddings=True)


def rows_of(run):
    return {
        name: value
        for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()
        if ".lora_" not in name
    }


@pytest.mark.parametrize(("kind", "tied"), [("new rows", True), ("in full", True), (WITH_NEW, False)])
def test_an_interrupted_run_continues_bit_for_bit(kind, tied, tiny_base, tied_base, tool_file, tmp_path, monkeypatch):
    settings = {"train__max_steps": 5, "train__eval_every": 2, "train__save_every": 100, **KINDS[kind]}
    base = tied_base if tied else tiny_base
    result = train(load_config(run_config(base, tool_file, tmp_path / "whole", **settings)))
    assert result.losses[-1] < result.losses[0]

    log_step = MetricsLog.log_step

    def interrupt(self, progress, *args, **keys):
        log_step(self, progress, *args, **keys)
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "log_step", interrupt)
    config = load_config(run_config(base, tool_file, tmp_path / "run", **settings))
    assert train(config).status == "interrupted"
    monkeypatch.undo()
    assert train(config).status == "finished"
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        found, expected = (tmp_path / run / "adapter" / name for run in ("run", "whole"))
        assert found.read_bytes() == expected.read_bytes()


def test_every_row_that_is_read_moves_and_is_recorded(tiny_base, tool_file, tmp_path, capfd):
    settings = KINDS[WITH_NEW] | {"data__eval": None}
    train(load_config(run_config(tiny_base, tool_file, tmp_path / "run", **settings)), show_progress=True)
    assert f"(including {ROWS + 2} rows of model.embed_tokens, 2 rows of lm_head)" in capfd.readouterr().err
    parameters = json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]
    assert parameters["trained_rows"] == {"model.embed_tokens": [0, ROWS + 2], "lm_head": [ROWS, ROWS + 2]}
    assert not parameters["shared_rows"]
    base = load_file(tiny_base / "model.safetensors")
    embedding, head = (rows_of(tmp_path / "run")[f"base_model.model.{name}"] for name in (
        "model.embed_tokens.weight", "lm_head.token_adapter.trainable_tokens_delta"
    ))  # fmt: skip
    was = base["model.embed_tokens.weight"]
    tokenizer = load_tokenizer(tmp_path / "run" / "adapter")
    read = {*tokenizer("Call tin oak fern moss 1234567890").input_ids} - {tokenizer.bos_token_id}
    never = {*tokenizer("äöüß{}~").input_ids} - {tokenizer.bos_token_id}
    changed = (embedding[:ROWS] != was).any(1)
    assert changed[[*read]].all()
    assert not changed[[*never]].any()
    assert (embedding[ROWS:] != was.float().mean(0).bfloat16()).any(1).all()
    assert (head != base["lm_head.weight"].float().mean(0).bfloat16()).any(1).all()


def test_a_run_answers_with_its_new_tokens(tied_base, tool_file, tmp_path):
    """Trained long enough, the model begins its answers with a new token."""
    settings = {"train__max_steps": 40, "train__learning_rate": 2e-2, "train__eval_every": None, **KINDS["new rows"]}
    train(load_config(run_config(tied_base, tool_file, tmp_path / "run", **settings)))
    model, tokenizer = load_run(tmp_path / "run")
    text = answer(model, tokenizer, [{"role": "user", "content": "Call oak 3"}], max_new_tokens=8)
    assert text.startswith("<tool>")
    assert model.get_input_embeddings().rows is model.get_output_embeddings().rows


def test_tokens_that_are_in_no_example_are_reported(tiny_base, tool_file, tmp_path, capfd):
    settings = {"data__new_tokens": [*TOKENS, "<never>"], "train__max_steps": 1}
    config = load_config(run_config(tiny_base, tool_file, tmp_path / "run", **settings))
    train(config, show_progress=True)
    message = "in no training example, so their use is not trained: '<never>'"
    assert message in capfd.readouterr().err
    assert any(note.endswith(message) for note in preview(config).reports[0].notes)


def test_a_token_that_the_base_has_is_refused(tiny_base, tool_file, tmp_path):
    config = load_config(run_config(tiny_base, tool_file, tmp_path / "run", data__new_tokens=["</s>"]))
    with pytest.raises(DataError, match=r"already has '</s>' \(id 257\)"):
        train(config)


def test_a_plain_runs_adapter_has_nothing_of_it(tiny_base, tool_file, tmp_path):
    train(load_config(run_config(tiny_base, tool_file, tmp_path / "run", train__max_steps=1)))
    assert rows_of(tmp_path / "run") == {}
    model, _ = load_run(tmp_path / "run")
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert model.dtype == load_base(str(tiny_base))[0].dtype


@needs_fork
@pytest.mark.parametrize("kind", ["new rows", "in full"])
def test_two_processes_train_what_one_does(kind, tied_base, tool_file, tmp_path):
    settings = {"train__max_steps": 3, "model__compute_dtype": "float32", "lora__dtype": "float32", **KINDS[kind]}
    settings["train__optimizer"] = "adamw_32bit"
    one = train(load_config(run_config(tied_base, tool_file, tmp_path / "one", **settings)))
    config = run_config(tied_base, tool_file, tmp_path / "two", train__micro_batch_size=1, **settings)
    two, _ = call_in_two(run, "train", config, "--json")
    assert two.json()["losses"] == pytest.approx(one.losses, rel=1e-4)
    found, expected = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-2, atol=1e-3)
