"""Releases of runs that trained rows of embedding and head: merged, verified, read back, and written as GGUF."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Qwen3Config

from qlora.config import load_config
from qlora.errors import CheckpointError
from qlora.export import merge
from qlora.model import load_base, load_run
from qlora.proof import verify
from qlora.training import train
from tests.export import forget_adapter
from tests.tiny import SIZES, make_base, run_config, write_jsonl

pytestmark = pytest.mark.slow

ROWS = SIZES["vocab_size"]
TOKENS = ["<tool>", "</tool>"]
BOTH = ["embed_tokens", "lm_head"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Class of the config, whether tied, rows of the base, modules in full, new tokens, rows of the release.
KINDS = {
    "in full": (LlamaConfig, False, ROWS, BOTH, [], ROWS),
    "tied, in full": (Qwen3Config, True, ROWS, ["lm_head"], [], ROWS),
    "new rows": (LlamaConfig, False, ROWS, [], TOKENS, ROWS + 2),
    "new rows among spare ones": (Qwen3Config, False, ROWS + 61, [], TOKENS, ROWS + 61),
    "tied, new rows": (LlamaConfig, True, ROWS, [], TOKENS, ROWS + 2),
    "tied and scaled, new rows in full": (Gemma3TextConfig, True, ROWS, ["embed_tokens"], TOKENS, ROWS + 2),
    "the head in full, with new rows": (LlamaConfig, False, ROWS, ["lm_head"], TOKENS, ROWS + 2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function that trains a run of a kind on its first call; its runs must not be changed."""
    folder, made = tmp_path_factory.mktemp("rows"), {}
    texts = [f"<tool>{word} {count}</tool>" for word in ("tin", "oak", "fern") for count in range(1, 9)]
    data = write_jsonl(folder / "tools.jsonl", [{"instruction": text[6:-7], "output": text} for text in texts])

    def run(kind):
        if kind not in made:
            config_class, tied, rows, modules, tokens, _ = KINDS[kind]
            made[kind] = folder / str(len(made)) / "run"
            made[kind].parent.mkdir()
            sizes = {"tie_word_embeddings": tied, "vocab_size": rows}
            base = make_base(made[kind].parent / "base", len(made), config_class, **sizes)
            settings = {"model__compute_dtype": "float32", "data__eval": None, "train__max_steps": 3}
            settings |= {"lora__modules_to_save": modules, "data__new_tokens": tokens}
            train(load_config(run_config(base, data, made[kind], **settings)))
        return made[kind]

    return run


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids).logits


def rows_of(run, base, module, size):
    """Return the expected weight, from the files of adapter and base."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    expected = torch.full((size, SIZES["hidden_size"]), torch.nan)
    weight = base[f"{module}.weight"].float()
    expected[: len(weight)] = weight
    if module in config.get("modules_to_save", []):
        expected[:] = tensors[f"base_model.model.{module}.weight"].float()
    elif module in config.get("trainable_token_indices", {}):
        rows = tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"]
        expected[config["trainable_token_indices"][module]] = rows.float()
    return expected


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_release_contains_the_trained_rows_and_is_verified(kind, onto, runs, tmp_path):
    run, (_, tied, _, _, tokens, size) = runs(kind), KINDS[kind]
    merge(run, tmp_path / "out", "float32", onto, max_shard_size="40KB")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    embedding, head = (part.weight for part in (merged.get_input_embeddings(), merged.get_output_embeddings()))
    assert (merged.config.vocab_size, merged.config.tie_word_embeddings) == (size, tied)
    assert (head is embedding) == tied
    base = load_file(run.parent / "base" / "model.safetensors")
    assert torch.equal(embedding, rows_of(run, base, "model.embed_tokens", size))
    if not tied:
        assert torch.equal(head, rows_of(run, base, "lm_head", size))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("a<tool>b 1</tool>", return_tensors="pt").input_ids
    assert ids.shape[1] == (7 if tokens else 18)
    model, _ = load_run(run)
    if onto == "dequantized":
        expected = logits_of(model, ids)
        assert (logits_of(merged, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
        report = verify(run, tmp_path / "out")
        assert report.matches, report.problems
        assert report.max_weight_difference < 1e-6
    again, _ = load_base(str(tmp_path / "out"))  # as a base for another run
    assert again.get_input_embeddings().num_embeddings == size


def test_a_base_with_its_shared_weight_twice_keeps_both_equal(runs, tmp_path):
    run = runs("tied, new rows")
    copy, base = (shutil.copytree(run.parent / name, tmp_path / name) for name in ("run", "base"))
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(run.parent / "base"), str(base)))
    merge(copy, tmp_path / "out", "float32", force=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[HEAD], written[EMBEDDING])
    assert len(written[HEAD]) == ROWS + 2
    problems = verify(copy, tmp_path / "out").problems
    assert not [problem for problem in problems if "tensor" in problem or "head" in problem]


@pytest.mark.parametrize(("name", "row"), [(EMBEDDING, ROWS), (EMBEDDING, 3), (HEAD, ROWS + 1), (HEAD, 100)], ids=str)
def test_a_changed_row_is_reported(name, row, runs, tmp_path):
    run = runs("new rows")
    merge(run, tmp_path / "out", "float32")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors[name][row, 7] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    (problem,) = verify(run, tmp_path / "out").problems
    assert problem.startswith(f"tensor {name} is not the base's with the trained rows")


@pytest.mark.parametrize("kind", ["new rows", "tied, new rows", "tied, in full"])
def test_an_adapter_without_its_trained_rows_is_refused(kind, runs, tmp_path):
    merge(runs(kind), tmp_path / "whole")
    forget_adapter(tmp_path / "whole")
    run = shutil.copytree(runs(kind), tmp_path / "run")
    config, weights = (run / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    values = json.loads(config.read_text())
    kept = {key: value for key, value in values.items() if key not in ("modules_to_save", "trainable_token_indices")}
    config.write_text(json.dumps(kept))
    factors = {name: value for name, value in load_file(weights).items() if ".lora_" in name}
    save_file(factors, weights, metadata={"format": "pt"})
    for use in (load_run, lambda run: merge(run, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="for no ids, the run for the ids"):
            use(run)
    assert "for no ids, the run for the ids" in verify(run, tmp_path / "whole").problems[-1]


def test_a_release_without_the_new_rows_is_reported(runs, tmp_path):
    run = runs("new rows")
    merge(run, tmp_path / "out", "float32")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value[:ROWS].clone() if name in (EMBEDDING, HEAD) else value for name, value in tensors.items()},
              path, metadata={"format": "pt"})  # fmt: skip
    problems = verify(run, tmp_path / "out").problems
    assert f"tensor {EMBEDDING} has the shape ({ROWS}, 64), not ({ROWS + 2}, 64)" in problems


@pytest.mark.parametrize(("run", "other"), [("new rows", "in full"), ("in full", "new rows")])
def test_a_release_of_a_run_with_another_vocabulary_is_reported(run, other, runs, tmp_path):
    merge(runs(other), tmp_path / "out", "float32")
    forget_adapter(tmp_path / "out")
    report = verify(runs(run), tmp_path / "out")
    sizes = {"new rows": ROWS + 2, "in full": ROWS}
    assert report.problems[-1] == f"{tmp_path / 'out'} predicts {sizes[other]} tokens, the run {sizes[run]}"
    assert report.adapter_loss is not None


def test_a_tokenizer_without_the_new_tokens_is_reported(runs, tmp_path):
    run = runs("new rows")
    merge(run, tmp_path / "out", "float32")
    AutoTokenizer.from_pretrained(run.parent / "base").save_pretrained(tmp_path / "out")
    problems = verify(run, tmp_path / "out").problems
    assert any("<tool></tool>" in problem for problem in problems)


def test_clients_that_cannot_load_the_adapter_are_reported(runs, tmp_path):
    merge(runs("new rows"), tmp_path / "out", "float32")
    clients = verify(runs("new rows"), tmp_path / "out").clients
    assert {name: verdict.loads for name, verdict in clients.items()} == {
        "peft": True, "vllm": False, "llama.cpp": False,
    }  # fmt: skip
    assert f"resize_token_embeddings({ROWS + 2})" in str(clients["peft"])


def test_the_card_lists_the_trained_rows(runs, tmp_path):
    merge(runs("the head in full, with new rows"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| rows trained in full | 2 of model.embed_tokens, {ROWS + 2} of lm_head |" in card
    assert "| new tokens | `<tool>` `</tool>` |" in card


@pytest.mark.parametrize("kind", ["new rows", "tied, new rows", "new rows among spare ones"])
def test_gguf_has_the_new_tokens_and_their_rows(kind, runs, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")

    run, size = runs(kind), KINDS[kind][-1]
    merge(run, tmp_path / "out", "float16", format="gguf")
    merge(run, tmp_path / "exact", "float32")
    report = verify(run, tmp_path / "out")
    assert report.matches, report.problems
    reader = gguf.GGUFReader(tmp_path / "out" / "out-f16.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == size
    assert tokens[ROWS : ROWS + 2] == TOKENS
    assert fields["tokenizer.ggml.token_type"][ROWS : ROWS + 2] == [int(gguf.TokenType.USER_DEFINED)] * 2
    architecture = fields["general.architecture"]
    assert fields[f"{architecture}.vocab_size"] == size
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    assert torch.equal(stored["token_embd.weight"], exact.get_input_embeddings().weight.half())
    assert ("output.weight" in stored) != KINDS[kind][1]
