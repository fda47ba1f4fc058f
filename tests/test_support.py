"""The table of supported architectures: its checks on three architectures, and the page's rows."""

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scripts.dev.support import checks
from scripts.dev.support.page import NOT_RUN, OPEN, REFUSED, TRAINED, read_rows, row_of, write_page
from scripts.dev.support.run import architectures
from scripts.dev.support.sizes import tiny_config
from tests.test_docs import ROOT
from tests.tiny import make_tokenizer

TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("support") / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    return folder


def check(name, tokenizer_folder, folder):
    auto_class = getattr(transformers, architectures()[name])
    return checks.check(transformers.CONFIG_MAPPING[name], auto_class, tokenizer_folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])  # a window and norms of its own; transposed weights
def test_a_supported_architecture_passes_every_check(name, tokenizer_folder, tmp_path):
    pytest.importorskip("peft")
    found = check(name, tokenizer_folder, tmp_path)
    assert found["wrong"] == []
    assert found["in 4 bits"] == found["adapted"] == 1
    assert found["verify"] == "matches"
    assert all(found[key] <= checks.LOGITS for key in ("base", "merged", "PEFT", "packed"))
    assert row_of(name, found)[0] == TRAINED


def test_an_architecture_that_sees_later_tokens_is_not_trained_silently(tokenizer_folder, tmp_path):
    found = check("bert", tokenizer_folder, tmp_path)
    assert not found["causal"]
    assert checks.REFUSED in found
    assert row_of("bert", found)[0] == REFUSED


def test_wrong_findings_are_found_and_open():
    right = {
        "class": "Some", "causal": True, "rows": "packed", "in 4 bits": 1.0, "adapted": 1.0, "step 0": 0.0,
        "packed": 1e-7, "merged": 1e-6, "verify": "matches", "base": 0.0, "PEFT": 1e-6,
    }  # fmt: skip
    assert [*checks._wrong(right)] == []
    for key, value in {
        "step 0": 1e-9, "packed": 1e-3, "merged": "lacks a.weight", "verify": "a problem", "base": 1e-3, "PEFT": 0.1,
        "failed": "KeyError: a", "causal": False, "in 4 bits": 0.2, "refused": "no",
    }.items():  # fmt: skip
        wrong = [*checks._wrong(right | {key: value})]
        assert len(wrong) == 1
        assert row_of("some", right | {key: value, "wrong": wrong})[0] == OPEN


def test_peft_may_leave_an_adapter_for_one_reason_alone():
    renames = "it renames a.q to a.b.q, as a tensor of the published files, and drops it silently"
    reasons = {
        f"does not load it: {renames}": [],
        f"does not load it: {renames}; the base has no layer a.k": ["PEFT"],
        "does not load it: a.experts has factors that are not of experts of rank 4": ["PEFT"],
        "loads it": ["PEFT"],
    }
    assert {reason: [*checks._wrong({"PEFT": reason})] for reason in reasons} == reasons


def test_rows_are_read_back_and_replaced(tmp_path):
    page = tmp_path / "support.md"
    refused = {"class": "A", "refused": "Not | this\none.", "wrong": []}
    rows = {"b": row_of("b", refused), "a": row_of("a", {"not run": "no", "wrong": []})}
    write_page(page, rows)
    assert read_rows(page) == rows
    assert rows["a"][0] == NOT_RUN
    assert "Of 2 architectures, 0 are trained, 1 are refused" in page.read_text(encoding="utf-8")


def test_tiny_configs_have_every_kind_of_layer():
    config = tiny_config(transformers.Qwen3NextConfig, 259, TOKENS)
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) == 4
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6


def test_the_page_has_a_row_for_every_causal_architecture():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= {*architectures()}
    rows = read_rows(ROOT / "docs" / "support.md")
    assert set(rows) >= {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral"}
