"""Trained rows of embedding and head on disk: PEFT reads them and computes the same."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PhiConfig, Qwen3Config

from qlora.checkpoint import load_adapter, read_adapter, save_adapter
from qlora.checkpoint.adapter_rows import StoredRows, rows_problems
from qlora.errors import CheckpointError
from qlora.files import BaseFiles
from qlora.lora import add_lora, lora_layers, train_rows, trained_rows
from qlora.model import build_skeleton, load_base
from tests.tiny import SIZES, make_base

ROWS = SIZES["vocab_size"]
BEHIND, SPARE = range(ROWS, ROWS + 3), range(ROWS - 9, ROWS - 4)
BOTH = ["embed_tokens", "lm_head"]
CASES = {
    "both in full": (LlamaConfig, False, BOTH, range(0)),
    "the embedding in full, new rows in the head": (LlamaConfig, False, ["embed_tokens"], BEHIND),
    "new rows": (LlamaConfig, False, [], BEHIND),
    "new rows among spare ones": (Qwen3Config, False, [], SPARE),
    "tied, in full": (LlamaConfig, True, ["lm_head"], range(0)),
    "tied, new rows": (Qwen3Config, True, [], BEHIND),
    "tied, and scaled": (Gemma3TextConfig, True, [], SPARE),
    "a head with biases": (PhiConfig, False, ["lm_head"], range(0)),
}


def trained_model(base, modules, new_ids, generator, dtype=torch.float32):
    """Return a model as in the middle of training: no trained value is the initial one."""
    model, _ = load_base(str(base), quantization="none", compute_dtype="float32")
    add_lora(model, rank=4, alpha=8, dtype=dtype)
    train_rows(model, modules, new_ids, dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter).mul_(0.1)
    return model.eval()


def save(model, folder):
    folder.mkdir()
    save_adapter(model, folder, "someone/base")
    return folder


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits


@pytest.fixture
def saved(tiny_base, tmp_path, generator):
    model = trained_model(tiny_base, ["lm_head"], BEHIND, generator)
    return model, save(model, tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_peft_and_a_fresh_model_compute_the_same(case, tmp_path, generator, seed):
    config_class, tied, modules, new_ids = CASES[case]
    base = make_base(tmp_path / "base", seed, config_class, torch.float32, tie_word_embeddings=tied)
    model = trained_model(base, modules, new_ids, generator)
    adapter = save(model, tmp_path / "adapter")
    ids = torch.tensor([torch.randint(ROWS - 9, (20,), generator=generator).tolist() + list(new_ids)])
    expected = logits_of(model, ids)
    plain = AutoModelForCausalLM.from_pretrained(base)
    if new_ids.stop > ROWS:
        plain.resize_token_embeddings(new_ids.stop)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        found = logits_of(PeftModel.from_pretrained(plain, adapter).eval(), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    fresh, _ = load_base(str(base), quantization="none", compute_dtype="float32")
    add_lora(fresh, rank=4, alpha=8, dtype=torch.float32)
    train_rows(fresh, modules, new_ids, torch.float32)
    assert not torch.allclose(logits_of(fresh, ids), expected, rtol=0.1)
    load_adapter(fresh, adapter)
    assert torch.equal(logits_of(fresh, ids), expected)


def test_an_adapter_without_rows_has_no_keys_for_them(tiny_base, tmp_path, generator):
    adapter = save(trained_model(tiny_base, [], range(0), generator), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not {"modules_to_save", "trainable_token_indices"} & {*config}
    assert all(".lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert read_adapter(adapter).rows == {}


def test_rows_and_factors_are_read_separately(saved):
    model, adapter = saved
    assert {*read_adapter(adapter).layers} == {name for name, _ in lora_layers(model)}
    rows, tensors = read_adapter(adapter).rows, load_file(adapter / "adapter_model.safetensors")
    assert {name: stored.ids for name, stored in rows.items()} == {
        "lm_head": range(BEHIND.stop),
        "model.embed_tokens": BEHIND,
    }
    for name, trained in trained_rows(model):
        assert torch.equal(tensors[rows[name].tensor], trained.weight)


@pytest.mark.parametrize(
    ("modules", "new_ids", "message"),
    [
        ([], BEHIND, f"rows of lm_head for the ids 0 to {BEHIND.stop - 1}, the model for the ids {ROWS} to"),
        (["lm_head"], range(0), rf"lm_head for the ids 0 to {BEHIND.stop - 1}, the model for the ids 0 to {ROWS - 1}"),
        (["lm_head"], range(ROWS, ROWS + 4), f"the model for the ids 0 to {ROWS + 3}"),
        ([], range(0), "the model for no ids"),
    ],
)
def test_a_model_that_trains_other_rows_is_refused(modules, new_ids, message, saved, tiny_base, generator):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(trained_model(tiny_base, modules, new_ids, generator), saved[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modules_to_save", "lm_head", "should be a list of names"),
        (
            "modules_to_save",
            ["lm_head", "model.norm"],
            "names model.norm, but the file has no rows of it",
        ),
        ("trainable_token_indices", {"model.embed_tokens": [1, 2.5]}, "should map modules to lists of ids"),
        ("trainable_token_indices", {"model.embed_tokens": [7, 9, 8]}, "should be 3 consecutive ids"),
        ("trainable_token_indices", {"model.embed_tokens": []}, "should be 3 consecutive ids"),
    ],
)
def test_a_config_that_does_not_fit_its_file_is_refused(key, value, message, saved):
    path = saved[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(saved[1])


def test_two_weights_for_a_shared_one_are_refused(tmp_path, generator, seed):
    base = make_base(tmp_path / "base", seed, tie_word_embeddings=True)
    model = trained_model(base, BOTH, range(0), generator)
    path = save(model, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"][3, 3] += 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="which shares its weight"):
        load_adapter(model, path.parent)


@pytest.mark.parametrize(
    ("start", "names", "fits"),
    [(262, ["model.embed_tokens"], True), (270, ["model.embed_tokens"], False), (0, [], True)],
)
def test_an_embedding_may_have_more_rows_than_the_head(start, names, fits, tiny_base):
    """As in Mllama; only rows that an adapter adds to one of them alone do not fit."""
    model = build_skeleton(BaseFiles.resolve(str(tiny_base)))
    model.set_input_embeddings(torch.nn.Embedding(270, 64, device="meta"))
    rows = {name: StoredRows(name, range(start, start + 2)) for name in names}
    problems = rows_problems(model, rows, {name: torch.empty(2, 64) for name in names})
    assert problems == ([] if fits else ["it adds rows to only one of model.embed_tokens and lm_head"])
