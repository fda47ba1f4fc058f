"""Metrics of answers: their values, and functions of a user."""

import sys

import pytest

from qlora.config.sections.evaluation import ANSWER_METRICS
from qlora.errors import ConfigError
from qlora.model.answer_metrics import METRICS, load_metric

REFERENCES = ["Paris", "the cat sat on the mat", "Yes.", "no"]


def test_every_name_of_the_config_is_a_metric():
    assert tuple(METRICS) == ANSWER_METRICS


@pytest.mark.parametrize(("name", "answers", "value"), [
    ("exact_match", [" Paris\n", "The cat sat on the mat", "yes", "no"], 0.5),
    ("contains", ["It is Paris.", "the cat", "No. Yes.", "none"], 0.75),
    # Two words of three and four; one of two and one. Articles and punctuation do not count.
    ("f1", ["Paris", "a cat sat, sat", "yes yes", "The no?"], (1 + 2 * 2 / 7 + 2 / 3 + 1) / 4),
    ("accuracy", ["paris!", "the cat", "YES", "no."], 0.75),
])  # fmt: skip
def test_the_value_of_a_metric(name, answers, value):
    assert load_metric(name)(answers, REFERENCES) == pytest.approx(value)


def test_macro_f1_is_the_mean_over_the_classes_of_the_references():
    answers, references = ["a", "B", "b", "what?", "A."], ["a", "a", "b", "b", "a"]
    # a: 2 right of 2 answers and 3 references; b: 1 right of 2 and 2. An unknown answer is no class of its own.
    assert load_metric("macro_f1")(answers, references) == pytest.approx((2 * 2 / 5 + 2 * 1 / 4) / 2)


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_translations_are_scored_by_sacrebleu(name):
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["Paris", "the cat sat on a mat", "Yes.", "nein"]
    expected = {"chrf": sacrebleu.corpus_chrf, "bleu": sacrebleu.corpus_bleu}[name](answers, [REFERENCES]).score
    assert 0 < load_metric(name)(answers, REFERENCES) == expected < 100
    assert load_metric(name)(REFERENCES, REFERENCES) == pytest.approx(100)


def test_sacrebleu_is_asked_for_if_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"eval\.metrics: chrf needs sacrebleu; run pip install sacrebleu\."):
        load_metric("chrf")


def written(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(body)
    return f"{path}:score"


def test_a_function_gets_both_lists_by_name(tmp_path):
    body = "def score(predictions, references):\n    return sum(map(len, predictions)) / len(references)\n"
    assert load_metric(written(tmp_path, body))(["aa", "b"], ["x", "y"]) == 1.5


@pytest.mark.parametrize(("body", "message"), [
    ("def other(): pass", "has no function score"),
    ("score = 3", "has no function score"),
    ("import nothing_like_this", "can't be run: ModuleNotFoundError: No module named 'nothing_like_this'"),
    ("def score(", "can't be run: SyntaxError"),
    ("def score(answer): return 1", "score failed: TypeError: .*it is called with the lists predictions="),
    ("def score(predictions, references): return 1 / 0", "score failed: ZeroDivisionError"),
    ("def score(**lists): return {'rouge': 1.0}", "returned {'rouge': 1.0}; it should return a finite number"),
    ("def score(**lists): return float('nan')", "returned nan; it should return a finite number"),
])  # fmt: skip
def test_a_function_that_can_not_be_used_is_one_error(body, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_metric(written(tmp_path, body))(["a"], ["a"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*absent\.py"):
        load_metric(f"{tmp_path}/absent.py:score")
