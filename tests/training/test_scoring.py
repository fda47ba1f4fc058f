"""Metrics of answers in a run: computed at every evaluation and by qlora eval, without changing the run."""

import pytest

import qlora
from qlora.config import load_config
from qlora.errors import ConfigError
from qlora.model import load_run
from qlora.training import train
from tests.cli import run as run_cli
from tests.tiny import write_jsonl
from tests.training.ranks import needs_fork, train_in_two
from tests.training.same_run import lines_of

METRICS = {"eval__metrics": ["exact_match", "contains", "f1"], "eval__rows": 5, "eval__max_new_tokens": 4}


def without_scores(lines):
    scores = tuple(f"_{name}" for name in ("exact_match", "contains", "f1", "share_of_o"))
    return [{key: value for key, value in line.items() if not key.endswith(scores)} for line in lines]


@pytest.fixture
def own_metric(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def share_of_o(predictions, references):\n"
        "    assert len(predictions) == len(references) == 5\n"
        "    return sum(text.count('o') for text in references) / sum(map(len, references))\n"
    )
    return f"{path}:share_of_o"


@pytest.mark.slow
def test_answers_are_scored_at_every_evaluation_and_the_steps_are_the_same(
    configure, own_metric, alpaca_file, tmp_path, monkeypatch, capsys
):
    train(configure("plain"))
    monkeypatch.chdir(tmp_path)
    sets = {"main": 0.2, "again": {"path": str(alpaca_file)}}
    metrics = [*METRICS["eval__metrics"], "mine.py:share_of_o"]
    config = configure(data__eval=sets, **METRICS | {"eval__metrics": metrics})
    result = train(config, show_progress=True)
    assert "answered 10 rows in " in capsys.readouterr().err
    names = {f"{name}_{metric}" for name in ("eval", "eval_again") for metric in ("exact_match", "contains", "f1")}
    assert result.evaluations.keys() == names | {
        "eval_loss", "eval_again_loss", "eval_share_of_o", "eval_again_share_of_o"
    }  # fmt: skip
    assert all(list(values) == [0, 2, 4, 6] for values in result.evaluations.values())
    again = ("eval_again_loss", "eval_again_perplexity", "eval_again_supervised_tokens")
    kept = without_scores(lines_of(tmp_path / "run"))
    lines = [{key: each[key] for key in each if key not in again} for each in kept]
    assert lines == lines_of(tmp_path / "plain")
    assert load_config(tmp_path / "run" / "config.yaml").eval.metrics[-1] == own_metric
    # The run's config names code, which is run only if it is asked for.
    report = qlora.evaluate(tmp_path / "run")
    assert report.as_dict()["f1"] == result.evaluations["eval_f1"][6]
    assert report.others["eval_again_contains"] == result.evaluations["eval_again_contains"][6]
    assert report.answered == 10
    assert report.notes == [f"{own_metric} was not run; add --metric {own_metric} (metrics= in Python) to run it"]
    shown = run_cli("eval", tmp_path / "run", "--metric", own_metric, "--metric", "contains")
    assert "share of o" in shown.out
    assert "exact match" not in shown.out
    assert "rows answered" in shown.out


@pytest.mark.slow
def test_a_score_is_that_of_the_answers_that_generate_gives(configure, tmp_path):
    rows = [{"instruction": f"Repeat {word}", "output": word} for word in ("oak", "fern", "tin", "moss")]
    train(configure(data__eval=str(write_jsonl(tmp_path / "held.jsonl", rows)), **METRICS))
    loaded = load_run(tmp_path / "run")
    prompts = [row["instruction"] for row in rows]
    answers = qlora.generate(loaded, prompts, max_new_tokens=4)
    held = [{"instruction": row["instruction"], "output": text} for row, text in zip(rows, answers, strict=True)]
    held = [row for row in held if row["output"].strip()]
    assert held
    data = write_jsonl(tmp_path / "answers.jsonl", held)
    report = qlora.evaluate(tmp_path / "run", data=data, metrics=["exact_match"])
    assert (report.metrics, report.answered) == ({"exact_match": 1.0}, len(held))


@pytest.mark.slow
def test_a_run_may_stop_by_a_score(configure, tmp_path):
    stopping = {"train__early_stopping": {"metric": "eval_exact_match", "patience": 1}}
    result = train(configure(**METRICS | stopping))
    scores = result.evaluations["eval_exact_match"]
    assert set(scores.values()) == {0.0}  # a random model
    assert (result.steps, result.best.step, result.best.metric) == (4, 2, "eval_exact_match")


@needs_fork
@pytest.mark.slow
def test_two_processes_share_the_rows(configure, tmp_path):
    settings = METRICS | {"model__compute_dtype": "float32", "lora__dropout": 0.0}
    configure("two", train__gradient_accumulation_steps=1, **settings)
    train_in_two(tmp_path / "two.yaml")
    train(configure("one", **settings))
    scores = [
        {line["step"]: line["eval_contains"] for line in lines_of(tmp_path / name) if "eval_contains" in line}
        for name in ("one", "two")
    ]
    assert len(scores[0]) == 4
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("settings", "message"), [
    ({"eval__metrics": ["rouge"]}, r"eval\.metrics: .*'rouge' is unknown; use exact_match, contains"),
    ({"eval__metrics": ["f1", "f1"]}, "has two metrics named f1"),
    ({"eval__metrics": ["mine.py:f1"]}, "has a function named f1, which is the name of another metric"),
    ({"eval__metrics": ["a.py:score", "b.py:score"]}, "has two metrics named score"),
    ({"eval__metrics": ["f1"], "data__eval": None}, "no rows are held out; set data.eval"),
    ({"eval__rows": 0}, r"eval\.rows"),
    ({"eval__max_new_tokens": -1}, r"eval\.max_new_tokens"),
    ({"eval__metric": ["f1"]}, r"eval\.metric: unknown key. Did you mean eval\.metrics\?"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, message, configure):
    with pytest.raises(ConfigError, match=message):
        configure(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "message"), [
    ({"eval__metrics": ["f1"], "data__eval": "EMPTY"}, r"no row of the set eval can be asked: 1 with no answer"),
    ({"eval__metrics": ["absent.py:score"]}, "there is no file .*absent.py"),
    ({"eval__metrics": ["f1"], "data__eval": "TEXTS"}, r"no held-out row has an answer in text .*\(formats: alp"),
    ({"eval__metrics": ["f1"], "train__keep_best": "eval_bleu"}, r"eval_bleu is not evaluated; .*eval_loss, eval_f1\."),
])  # fmt: skip
def test_what_can_not_be_scored_is_reported_before_the_model_is_loaded(
    settings, message, configure, tmp_path, monkeypatch
):
    monkeypatch.setattr("qlora.training.assemble.load_for_training", None)
    texts = str(write_jsonl(tmp_path / "texts.jsonl", [{"text": "some text"}]))
    reasoned = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>"}]}]
    files = {"TEXTS": texts, "EMPTY": str(write_jsonl(tmp_path / "empty.jsonl", reasoned))}
    settings = {key: files.get(str(value), value) for key, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        train(configure(**settings))


@pytest.mark.slow
def test_a_metric_that_fails_is_one_error_and_the_run_can_continue(configure, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def score(predictions, references):\n    return predictions[0][99]\n")
    settings = METRICS | {"eval__metrics": [f"{path}:score"]}
    with pytest.raises(ConfigError, match="score failed: IndexError"):
        train(configure(**settings))
    path.write_text("def score(predictions, references):\n    return len(predictions)\n")
    assert train(configure(**settings)).evaluations["eval_score"] == dict.fromkeys((0, 2, 4, 6), 5)
