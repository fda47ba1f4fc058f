"""Reports: numbers that add up, and a line for everything out of the ordinary."""

import json
import random

import pytest

from qlora.data import DataReport
from qlora.data.report import QUANTILES, histogram


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def in_bin(lengths, edges, place):
    """Lengths up to an edge and above the one before."""
    below = edges[place - 1] if place else 0
    return sum(below < length <= edges[place] for length in lengths)


@pytest.mark.parametrize("max_seq_len", [8, 20, 64, 100, 2048])
def test_every_length_is_in_one_bin(rng, max_seq_len):
    lengths = [int(rng.lognormvariate(4, 1.5)) + 1 for _ in range(rng.randrange(1, 300))]
    found = histogram(lengths, max_seq_len)
    edges = [edge for edge, _ in found]
    assert sum(count for _, count in found) == len(lengths)
    assert edges == sorted(set(edges))
    assert edges[-1] >= max(lengths)
    assert [count for _, count in found] == [in_bin(lengths, edges, place) for place in range(len(edges))]
    assert found[0][1] > 0
    assert found[-1][1] > 0


@pytest.mark.parametrize(("lengths", "max_seq_len", "expected"), [
    ([], 20, []),
    ([1], 20, [[8, 1]]),
    ([8, 9, 16, 17], 64, [[8, 1], [16, 2], [32, 1]]),
    ([8, 64], 100, [[8, 1], [16, 0], [32, 0], [64, 1]]),
    ([20, 21, 40], 20, [[20, 1], [32, 1], [64, 1]]),  # the limit is an edge where something is beyond it
    ([20, 17], 20, [[32, 2]]),
    ([2048, 2049], 2048, [[2048, 1], [4096, 1]]),
])  # fmt: skip
def test_bins_double_and_one_ends_at_the_limit(lengths, max_seq_len, expected):
    assert histogram(lengths, max_seq_len) == expected


def test_quantiles_are_lengths_that_are_there(rng):
    lengths = [rng.randrange(1, 5000) for _ in range(rng.randrange(1, 400))]
    report = DataReport("rows.jsonl")
    report.measure(lengths, 2048)
    assert list(report.lengths) == list(QUANTILES)
    ordered = sorted(lengths)
    assert (report.lengths["shortest"], report.lengths["longest"]) == (ordered[0], ordered[-1])
    for name, share in QUANTILES.items():
        place = share * (len(ordered) - 1)
        assert report.lengths[name] in (ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)])
    assert list(report.lengths.values()) == sorted(report.lengths.values())


def test_a_plain_report_is_one_line():
    report = DataReport("rows.jsonl", "text", "chatml", rows=3, examples=3, drawn=3, tokens=8, supervised_tokens=6)
    assert report.summary() == (
        "rows.jsonl: 3 rows as text, 3 examples, 8 tokens, 75% supervised; chat template: chatml"
    )


@pytest.mark.parametrize(("changes", "line"), [
    ({"bad_rows": 2}, "2 bad rows dropped"),
    ({"deduplicated": 9}, "9 examples removed, equal to an earlier or a held-out one"),
    ({"duplicates": 4}, "4 rows equal to an earlier one"),
    ({"duplicates": 1}, "1 row equal to an earlier one"),
    ({"per_answer": 5}, "5 conversations trained answer by answer, as the history that a server renders differs"),
    ({"eos_added": 6}, "6 conversations with EOS added, as the template writes no end token"),
    ({"empty_answers": 7}, "7 conversations with an empty answer"),
    ({"overlong": {"truncated": 8}}, "8 documents truncated because of max_seq_len"),
    ({"unread_columns": ["id", "lang"]}, "columns not read: id, lang"),
    ({"unread_keys": ["id", "lang"]}, "keys of turns not read: id, lang"),
    (
        {"switched": {"enable_thinking=false": 9}},
        "9 answers with enable_thinking=false in the prompt; set it on the server",
    ),
    (
        {"control_tokens": {"<s>": 2, "</s>": 1}},
        "3 control tokens in the text of turns, tokenized as such: </s> 1, <s> 2; an end token in an answer is not "
        "supervised",
    ),
    (
        {"control_tokens": {"<s>": 1}},
        "1 control token in the text of turns, tokenized as such: <s> 1; an end token in an answer is not supervised",
    ),
    ({"notes": ["begin no answer with a space"]}, "begin no answer with a space"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_all_that_is_not_plain_has_a_line_of_its_own(changes, line):
    assert DataReport("rows.jsonl", **changes).remarks() == [line]


def test_a_report_survives_json():
    report = DataReport(
        "rows.jsonl",
        rows=3,
        overlong={"split": 1},
        problems=[{"cause": "broken", "count": 1, "examples": ["rows.jsonl:1"]}],
    )
    report.measure([3, 9, 30], 20)
    assert DataReport(**json.loads(json.dumps(report.as_dict()))) == report


def test_no_tokens_are_no_division_by_zero():
    assert DataReport("rows.jsonl").supervised_share == 0
