"""Verification of files other than tensors: a mismatch of head, tokenizer, template or end tokens is reported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.inkling2 import Inkling2TextConfig

from qlora.export import merge
from qlora.files import BaseFiles
from qlora.lora import ScoreHead
from qlora.model import build_skeleton
from qlora.model.names import names_in_files
from qlora.proof import verify
from qlora.proof.files import check_head, check_scores
from scripts.dev.support.sizes import tiny_config
from tests.export import change_tensors

HEAD = "lm_head.weight"


def set_tied(folder, is_tied):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": is_tied}))


def test_an_untied_head_in_a_tied_model_is_reported(tied, tmp_path):
    shutil.copytree(tied / "out", tmp_path / "out")
    assert verify(tied / "run", tmp_path / "out").problems == []
    change_tensors(tmp_path, lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"] * 1.5}))
    problems = verify(tied / "run", tmp_path / "out").problems
    assert f"tensor {HEAD} is not in the base" in problems
    assert f"config.json ties the head to the embeddings, but the files have a different one in {HEAD}" in problems
    set_tied(tmp_path / "out", False)
    problems = verify(tied / "run", tmp_path / "out").problems
    assert f"tensor {HEAD} is not in the base" in problems
    assert "config.json does not tie the head to the embeddings, unlike the base (tie_word_embeddings)" in problems


def test_a_tied_model_whose_config_says_untied_is_reported(tied, tmp_path):
    shutil.copytree(tied / "out", tmp_path / "out")
    set_tied(tmp_path / "out", False)
    report = verify(tied / "run", tmp_path / "out")
    problem = "config.json does not tie the head to the embeddings, but the files have no weights for it"
    assert problem in report.problems
    assert report.merged_loss is None  # transformers would fill in random values


def test_a_head_tied_in_an_untied_model_is_reported(own):
    set_tied(own / "out", True)
    problems = verify(own / "run", own / "out").problems
    assert f"config.json ties the head to the embeddings, but the files have a different one in {HEAD}" in problems
    change_tensors(own, lambda tensors: tensors.pop(HEAD))
    report = verify(own / "run", own / "out")
    assert f"tensor {HEAD} is missing" in report.problems
    assert "config.json ties the head to the embeddings, unlike the base (tie_word_embeddings)" in report.problems
    assert any(problem.startswith("mean KL") for problem in report.problems)


def test_a_separate_head_of_a_base_with_a_tied_config_must_be_untied(tied, tmp_path):
    """transformers uses the stored head even if the config says tied, so the release's config must say untied."""
    for name in ("base", "out"):
        shutil.copytree(tied / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors[HEAD] = tensors["model.embed_tokens.weight"] * 1.5
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})

    def problems():
        base, out = (BaseFiles.resolve(str(tmp_path / name)) for name in ("base", "out"))
        return check_head(build_skeleton(base), base, build_skeleton(out), out)

    assert len(problems()) == 2
    set_tied(tmp_path / "out", False)
    assert problems() == []


def test_changed_end_tokens_are_reported(own):
    path = own / "out" / "generation_config.json"
    right = json.loads(path.read_text())
    assert right["eos_token_id"] == [257]
    path.write_text(json.dumps(right | {"eos_token_id": [257, 65]}))
    assert verify(own / "run", own / "out").problems == ["generation_config.json ends at 65 ('b')"]
    path.write_text(json.dumps(right | {"eos_token_id": 258}))
    assert verify(own / "run", own / "out").problems == [
        "generation_config.json lacks the end token 257 ('</s>')",
        "generation_config.json ends at 258 ('<|im_end|>')",
    ]
    path.unlink()
    assert verify(own / "run", own / "out").problems == ["generation_config.json is missing"]


def test_a_tokenizer_with_other_ids_is_reported(own):
    path = own / "out" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    (problem,) = verify(own / "run", own / "out").problems
    assert problem.startswith('the tokenizer gives other ids for "Hello, world!')


def test_another_chat_template_is_reported(own):
    path = own / "out" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert report.problems == ["the chat template differs from the run's"]


@pytest.fixture
def sharded(merged, tmp_path):
    """A release of several files, which a test may change."""
    merge(merged / "run", tmp_path / "out", max_shard_size="60KB")
    assert verify(merged / "run", tmp_path / "out").problems == []
    return tmp_path / "out"


def test_a_file_that_would_be_loaded_instead_of_the_indexed_ones_is_reported(sharded, merged):
    tensors = load_file(merged / "out" / "model.safetensors")
    save_file({name: value * 0 for name, value in tensors.items()}, sharded / "model.safetensors", {"format": "pt"})
    assert AutoModelForCausalLM.from_pretrained(sharded).lm_head.weight.abs().max() == 0
    (problem,) = verify(merged / "run", sharded).problems
    assert "has model.safetensors and model.safetensors.index.json for other files" in problem
    (sharded / "model.safetensors").rename(sharded / "more.safetensors")
    assert verify(merged / "run", sharded).problems == [
        "more.safetensors is not a file of the model, and may be loaded with it or instead of it"
    ]


def test_swapped_files_are_reported(sharded, merged):
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    names = sorted({**load_file(one), **load_file(other)})
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert verify(merged / "run", sharded).problems == [
        f"model.safetensors.index.json names the wrong file for {len(names)} tensors; the first is {names[0]}"
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_position_embeddings", 32), ("sliding_window", 8), ("dtype", "float32"), ("bos_token_id", 7)],
)
def test_a_config_that_describes_another_model_is_reported(key, value, own):
    """None of these keys changes the predictions for a short text."""
    path = own / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (problem,) = verify(own / "run", own / "out").problems
    assert problem.startswith(f"config.json has {key}: {value!r}, ")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_truncated_companion_file_is_reported_once(name, own):
    path = own / "out" / name
    path.write_bytes(path.read_bytes()[:50])
    report = verify(own / "run", own / "out")
    assert not report.matches
    assert sum(str(own / "out") in problem for problem in report.problems) == 1
    assert report.tensors_checked == 21


@pytest.mark.parametrize(("labels", "others"), [(("LABEL_0", "LABEL_1"), ("LABEL_1", "LABEL_0")), (("a", "b"), ())])
def test_the_labels_of_a_head_are_compared_by_name(labels, others, tmp_path):
    def problems(written):
        head = ScoreHead(2, labels, "single_label_classification")
        config = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0, **written.config()}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return check_scores(BaseFiles(tmp_path, "written"), head, 0)

    assert problems(ScoreHead(2, labels, "single_label_classification")) == []
    (problem,) = problems(ScoreHead(2, others, "single_label_classification"))
    assert "config.json has id2label" in problem


def test_a_head_that_is_made_of_another_tensor_is_found(tmp_path, seed):
    """Inkling 2 has a scaled head, which is stored without the scale."""
    tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(tiny_config(Inkling2TextConfig, 259, tokens)).save_pretrained(tmp_path)
    files = BaseFiles.resolve(str(tmp_path))
    skeleton = build_skeleton(files)
    assert "lm_head.weight" not in names_in_files(skeleton, files.tensors)[0]
    assert check_head(skeleton, files, skeleton, files) == []
