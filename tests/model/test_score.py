"""Models that score documents: their head from seed or files, the scores of a batch, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from qlora.data import collate, make_example
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.lora import ScoreHead, add_lora, scores_documents, train_rows
from qlora.model import build_skeleton, generate, load_base, mixed_reason
from qlora.model.score import check_scores, document_scores, last_scores
from qlora.nf4 import NF4Linear
from tests.reference.reward import scores_one_by_one
from tests.tiny import make_base

FAMILIES = ("LlamaConfig", "Qwen3Config", "Gemma2Config", "GPT2Config", "OPTConfig", "GPTNeoXConfig", "BloomConfig")


def documents(generator, *lengths):
    return [make_example(torch.randint(256, (each,), generator=generator).tolist(), [True] * each) for each in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_architectures_own_class(family, generator, seed, tmp_path):
    base = make_base(tmp_path / "base", seed, getattr(transformers, family), torch.float32)
    model, _ = load_base(str(base), head=ScoreHead(3), compute_dtype="float32", seed=seed)
    assert scores_documents(model)
    assert not isinstance(model.score, NF4Linear)
    given = documents(generator, 7, 3, 12)
    expected = scores_one_by_one(model, given)
    assert torch.allclose(document_scores(model, collate(given)), expected, rtol=1e-4, atol=1e-5)
    check_scores(model, given[0])
    add_lora(model, rank=2)
    assert train_rows(model, dtype=torch.float32) == {"score": range(3)}
    check_scores(model, given[0])
    assert torch.allclose(document_scores(model, collate(given)), expected, rtol=1e-4, atol=1e-5)


def test_the_head_follows_from_the_seed_alone(tiny_base):
    first, _ = load_base(str(tiny_base), head=ScoreHead(2), seed=4)
    torch.manual_seed(1)
    again, _ = load_base(str(tiny_base), head=ScoreHead(2), seed=4)
    other, _ = load_base(str(tiny_base), head=ScoreHead(2), seed=5)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.std().item() == pytest.approx(first.config.initializer_range, rel=0.3)


@pytest.mark.parametrize(("head", "is_taken"), [
    (ScoreHead(2), True),
    (ScoreHead(2, ("no", "yes")), True),
    (ScoreHead(2, ("yes", "no")), False),
    (ScoreHead(3), False),
])  # fmt: skip
def test_a_bases_own_head_is_taken_if_it_gives_the_same_scores(head, is_taken, tiny_base, tmp_path):
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    theirs.save_pretrained(tmp_path)
    load_base(str(tiny_base))[1].save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), head=head, compute_dtype="bfloat16")
    assert torch.equal(model.score.weight, theirs.score.weight.bfloat16()) == is_taken
    assert model.score.weight.shape == (head.num_labels, 64)
    expected = head.labels or ("LABEL_0", "LABEL_1", "LABEL_2")[: head.num_labels]
    assert model.config.id2label == dict(enumerate(expected))


def test_new_tokens_get_rows_of_the_embedding_but_no_scores(tiny_base):
    model, _ = load_base(str(tiny_base), head=ScoreHead(2))
    assert train_rows(model, new_ids=range(259, 262)) == {"model.embed_tokens": range(259, 262), "score": range(2)}


@pytest.mark.parametrize(("family", "problem"), [
    ("GraniteConfig", "transformers has no class of granite that scores documents"),
    ("BertLMHeadModel", "BertForSequenceClassification scores documents by another module"),
])  # fmt: skip
def test_bases_that_can_not_score_documents_are_refused_by_name(family, problem, tiny_base, tmp_path):
    if family == "GraniteConfig":
        make_base(tmp_path, 1, transformers.GraniteConfig)
    else:
        sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.BertConfig(**sizes, is_decoder=True)
        config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=problem):
        build_skeleton(BaseFiles.resolve(str(tmp_path), with_weights=False), head=ScoreHead(1))


def test_another_place_of_the_scores_is_refused(tiny_base, generator):
    # Several scores, because a single one may be the same at two tokens by chance.
    model, _ = load_base(str(tiny_base), head=ScoreHead(5), compute_dtype="float32")
    model.config.pad_token_id = 258
    (ended,) = documents(generator, 6)
    ended.input_ids[-1] = 258  # so that transformers reads the scores one token earlier
    with pytest.raises(ModelError, match="elsewhere than at its last token"):
        check_scores(model, ended)


def test_packed_documents_are_checked_by_their_scores(tiny_base, generator):
    model, _ = load_base(str(tiny_base), head=ScoreHead(1), compute_dtype="float32")
    first, second = documents(generator, 5, 8)
    assert mixed_reason(model, first, second, last_scores) is None


def test_a_model_that_scores_texts_is_refused_where_answers_are_asked_for(tiny_base, tmp_path):
    model, tokenizer = load_base(str(tiny_base), head=ScoreHead(1))
    with pytest.raises(ModelError, match="LlamaForSequenceClassification scores texts"):
        generate((model, tokenizer), "Hello")
    shutil.copytree(tiny_base, tmp_path / "scorer")
    config = json.loads((tiny_base / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "scorer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="scores texts, and has no head that answers could come from"):
        generate(str(tmp_path / "scorer"), "Hello")
