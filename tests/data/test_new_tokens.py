"""New tokens: after all others, found in any text, and counted."""

import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from qlora.data import add_new_tokens, build_datasets, new_token_ids
from qlora.data.sources import Source
from qlora.errors import DataError
from tests.tiny import make_tokenizer, write_jsonl

TOKENS = ["<tool>", "</tool>", "Angstrom"]


def test_they_get_the_ids_after_all_others_and_cut_the_text(tmp_path):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    assert add_new_tokens(tokenizer, TOKENS) == range(size, size + 3)
    ids = tokenizer("x<tool>Angstrom </tool>", add_special_tokens=False).input_ids
    assert [id_ for id_ in ids if id_ >= size] == [size, size + 2, size + 1]
    assert len(ids) == 5
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert new_token_ids(saved, TOKENS) == range(size, size + 3)
    assert saved.decode(ids, skip_special_tokens=True) == "x<tool>Angstrom </tool>"


def test_without_any_a_tokenizer_is_as_it_was():
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    assert add_new_tokens(tokenizer, []) == range(0)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("token", ["</s>", "a"])
def test_what_the_tokenizer_has_is_refused_with_its_id(token):
    tokenizer = make_tokenizer()
    with pytest.raises(
        DataError, match=rf"data.new_tokens: .*already has '{token}' \(id {tokenizer.get_vocab()[token]}\)"
    ):
        add_new_tokens(tokenizer, ["<tool>", token])


def test_what_it_would_write_otherwise_is_refused():
    with pytest.raises(DataError, match="decodes 'Ångström' to"):
        add_new_tokens(make_tokenizer(), ["<tool>", "Ångström"])


def test_tokens_that_another_tokenizer_lacks_are_reported():
    with pytest.raises(
        DataError, match=r"the tokenizer has no '<tool>', '</tool>', 'Angstrom'; use the run's own tokenizer"
    ):
        new_token_ids(make_tokenizer(), TOKENS)
    tokenizer = make_tokenizer()
    add_new_tokens(tokenizer, [*TOKENS[1:], TOKENS[0]])
    with pytest.raises(DataError, match="are not consecutive"):
        new_token_ids(tokenizer, TOKENS)


def test_examples_are_counted_as_often_as_they_are_chosen(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("qlora.data.store.IDS_PER_BLOCK", 7)
    draw = random.Random(seed)
    tokenizer = make_tokenizer()
    ids = add_new_tokens(tokenizer, TOKENS)
    texts = ["".join(draw.choices(["a", "bc", *TOKENS[:2]], k=draw.randint(1, 12))) for _ in range(20)]
    sources = [
        Source(str(write_jsonl(tmp_path / f"{number}.jsonl", [{"text": text} for text in part])), weight=weight)
        for number, (part, weight) in enumerate([(texts[:9], 2.5), (texts[9:], 1)])
    ]
    datasets = build_datasets(tokenizer, sources, 0.2, cache_dir=str(tmp_path / "cache"))
    chosen = np.concatenate([example.input_ids for example in datasets.train])
    assert datasets.train.count_ids(ids) == [int((chosen == id_).sum()) for id_ in ids]
    assert datasets.train.count_ids(range(0)) == []
