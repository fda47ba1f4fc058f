"""Packing: no document is lost or cut, and rows are as full as by exhaustive best fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qlora.data import BatchPlan, EncodeOptions, Source, build_datasets
from qlora.data.packing import pack_best_fit
from tests.reference.packing import pack


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_rows_are_those_of_looking_at_each_for_each_document(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = pack_best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fills, expected = (
        sorted(sum(lengths[index] for index in row) for row in packed) for packed in (rows, pack(lengths, capacity))
    )
    assert fills == expected
    assert max(fills, default=0) <= capacity


def test_the_same_documents_always_give_the_same_rows(seed):
    lengths = np.random.default_rng(seed).integers(1, 100, size=500)
    rows = list(pack_best_fit(lengths, 100))
    assert list(pack_best_fit(lengths.copy(), 100)) == rows
    assert list(pack_best_fit(lengths.astype(np.int32), 100)) == rows


def test_a_document_as_long_as_a_row_has_it_alone():
    assert sorted(pack_best_fit(np.array([3, 8, 8, 5]), 8)) == [[0, 3], [1], [2]]


def test_a_document_longer_than_a_row_is_no_silent_overflow():
    with pytest.raises(AssertionError):
        pack_best_fit(np.array([3, 9]), 8)


def test_many_documents_take_little_time(seed):
    """Looking at each row for each document would take hours."""
    lengths = np.random.default_rng(seed).integers(1, 2049, size=100_000)
    rows = pack_best_fit(lengths, 2048)
    assert sum(map(len, rows)) == 100_000
    assert lengths.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.slow
def test_real_instructions_fill_their_rows(realdata, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "qwen3")
    source = Source(str(realdata / "data" / "llama_factory_demo" / "alpaca_en_demo.json"))
    options = EncodeOptions(max_seq_len=2048)
    built = build_datasets(tokenizer, [source], options=options, chat_template="chatml", cache_dir=str(tmp_path))
    plan = BatchPlan(built.train.lengths, 1, 1, capacity=2048)
    assert len(built.train) > 900
    assert plan.fill >= 0.97
    assert plan.fill == built.reports[0].tokens / (len(plan.rows) * 2048)
