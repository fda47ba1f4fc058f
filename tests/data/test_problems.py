"""Bad rows by cause: each cause once, for any values, and a readable number of rows."""

import random

import pytest

from qlora.data.problems import KEPT_CAUSES, SHOWN_CHARACTERS, SHOWN_EXAMPLES, ProblemLog, problem_lines
from qlora.data.report import DataReport


def log_of(*texts, values=None):
    log = ProblemLog()
    for number, text in enumerate(texts, start=1):
        log.add(f"rows.jsonl:{number}", text, values)
    return log.problems()


@pytest.mark.parametrize(("one", "other", "cause"), [
    ("'a' should be text, not 3.", "'a' should be text, not [1; 'x. y'].", "'a' should be text, not …"),
    ("a turn has no 'role': {'x': 1}; map it.", "a turn has no 'role': ['; ']; map it.",
     "a turn has no 'role': …; map it."),
    ("the user turn's text, 'Hi'; set it.", "the user turn's text, 'so; it is'; set it.",
     "the user turn's text, …; set it."),
    ("character 3 of 'a b' is half a pair.", "character 17 of 'c' is half a pair.", "character … of … is half a pair."),
    ("2 fields, but the header names 3.", "4 fields, but the header names 3.", "… fields, but the header names 3."),
    ("a weight should be 0, not 7.5.", "a weight should be 0, not 'x'.", "a weight should be 0, not …"),
], ids=range(6))  # fmt: skip
def test_rows_that_differ_in_their_values_have_one_cause(one, other, cause):
    assert log_of(one, other, one) == [
        {"cause": cause, "count": 3, "examples": [f"rows.jsonl:{n}: {t}" for n, t in enumerate((one, other, one), 1)]}
    ]


@pytest.mark.parametrize(("one", "other"), [
    ("column 'a' should be text, not 3.", "column 'b' should be text, not 3."),
    ("column '0' should be text, not 3.", "column '1' should be text, not 3."),
    ("role 'bot' is none of user, tool; map it with data.roles.", "role 'me' is none of user, tool; map it."),
    ("it should end with the answer, not with a user turn.", "it should end with the answer, not with a tool turn."),
    ("broken JSON: Extra data (column 3).", "broken JSON: Invalid control character (column 3)."),
], ids=range(5))  # fmt: skip
def test_rows_that_need_another_remedy_have_causes_of_their_own(one, other):
    assert [(each["cause"], each["count"]) for each in log_of(one, other, other)] == [(other, 2), (one, 1)]


def test_an_example_shows_the_row_where_the_cause_says_all():
    values = {"text": "x" * 300}
    (problem,) = log_of("it has no tokens.", values=values)
    assert problem["examples"] == [f"rows.jsonl:1: {repr(values)[:SHOWN_CHARACTERS]}"]
    assert log_of("broken JSON.") == [{"cause": "broken JSON.", "count": 1, "examples": ["rows.jsonl:1"]}]


def test_an_origin_in_front_of_a_problem_and_a_secret_in_a_row_are_left_out(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "swordfish-42")
    (problem,) = log_of("rows.jsonl:1: it has no tokens.", values={"text": "swordfish-42"})
    assert problem["cause"] == "it has no tokens."
    assert problem["examples"] == ["rows.jsonl:1: {'text': '***'}"]


def test_many_causes_of_many_rows_stay_few_lines(seed):
    rng = random.Random(seed)
    texts = [f"column '{chr(97 + rng.randrange(26))}{chr(97 + rng.randrange(9))}' is absent." for _ in range(3000)]
    problems = log_of(*texts, values={})
    assert len(problems) == KEPT_CAUSES
    assert [each["count"] for each in problems] == sorted(
        [texts.count(each["cause"]) for each in problems], reverse=True
    )
    assert max(len(each["examples"]) for each in problems) == SHOWN_EXAMPLES
    report = DataReport("rows.jsonl", rows=3000, bad_rows=3000, problems=problems)
    others = 3000 - sum(each["count"] for each in problems)
    assert report.problem_lines() == [*problem_lines(problems), f"{others:,} rows: other causes"]


def test_values_that_look_like_the_mark_of_differing_values_are_values():
    one, other = "role 'agent …' is none of user; map it.", "role 'agent 3' is none of user; map it."
    assert [(each["cause"], each["count"]) for each in log_of(one, other)] == [(one, 1), (other, 1)]
    (problem,) = log_of("'a' should be text, not …", "'a' should be text, not …", values={"a": "…"})
    assert problem["examples"] == ["rows.jsonl:1: {'a': '…'}", "rows.jsonl:2: {'a': '…'}"]
