"""What becomes of every row: kept, cut, held out or told."""

import json
import random

import numpy as np
import pytest

from qlora.data import build_datasets
from qlora.data.datasets import SHOWN_PROBLEMS
from qlora.errors import DataError
from tests.data.test_tokens import REWRITING
from tests.tiny import make_tokenizer, write_jsonl

MAX = 20


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def text_rows(lengths):
    """A row per length; with a byte tokenizer, BOS and EOS it has exactly that many tokens."""
    return [{"text": chr(ord("a") + number % 26) * (length - 2)} for number, length in enumerate(lengths)]


def build(path, rows, **settings):
    if rows is not None:
        write_jsonl(path, rows)
    return build_datasets(make_tokenizer(), str(path), **{"max_seq_len": MAX, **settings})


def refusal(path, rows, **settings):
    with pytest.raises(DataError) as caught:
        build(path, rows, **settings)
    return str(caught.value)


def keys(examples):
    return [tuple(example.input_ids.tolist()) for example in examples]


@pytest.fixture
def lengths(rng):
    """Lengths on both sides of the limit, and the limit itself."""
    short = [rng.randrange(3, MAX + 1) for _ in range(8)]
    long = [rng.randrange(MAX + 1, 4 * MAX) for _ in range(7)]
    return rng.sample([*short, MAX, *long], k=16)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def test_the_longest_examples_that_fit_are_kept(path, rng):
    lengths = [rng.randrange(3, MAX + 1) for _ in range(5)] + [MAX]
    datasets = build(path, text_rows(lengths))
    assert [len(example) for example in datasets.train] == lengths
    assert datasets.reports[0].overlong == {}


def test_overlong_examples_are_dropped_and_counted(path, lengths):
    datasets = build(path, text_rows(lengths), overlong="drop")
    kept = [length for length in lengths if length <= MAX]
    assert [len(example) for example in datasets.train] == kept
    assert datasets.reports[0].overlong == {"dropped": len(lengths) - len(kept)}


def test_overlong_examples_are_truncated_and_counted(path, lengths):
    whole = build(path, text_rows(lengths), max_seq_len=10**6)
    datasets = build(path, None, overlong="truncate")
    assert keys(datasets.train) == [ids[:MAX] for ids in keys(whole.train)]
    assert datasets.reports[0].overlong == {"truncated": sum(length > MAX for length in lengths)}


def test_overlong_examples_are_split_and_counted(path, lengths):
    whole = build(path, text_rows(lengths), max_seq_len=10**6)
    datasets = build(path, None, overlong="split")
    assert max(map(len, datasets.train)) == MAX
    joined, parts = [], list(keys(datasets.train))
    for ids in keys(whole.train):
        wanted = -(-len(ids) // MAX)
        # A single token at the end has nothing before it to be predicted from.
        wanted -= len(ids) % MAX == 1
        joined.append(tuple(token for part in parts[:wanted] for token in part))
        parts = parts[wanted:]
        assert joined[-1] == ids[: len(joined[-1])]
        assert len(joined[-1]) >= len(ids) - 1
    assert parts == []
    assert not any(example.loss_mask[0] for example in datasets.train)
    assert datasets.reports[0].overlong == {"split": sum(length > MAX for length in lengths)}


def test_an_overlong_example_is_an_error_where_asked_for(path):
    assert build(path, text_rows([MAX, 5]), overlong="error").reports[0].examples == 2
    message = refusal(path, text_rows([5, MAX + 3]), overlong="error")
    assert message.startswith(f"{path}:2: ")
    assert f"{MAX + 3} tokens" in message
    assert f"data.max_seq_len ({MAX})" in message
    assert "data.overlong" in message


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_a_part_without_an_answer_is_not_kept(path, overlong):
    rows = [{"prompt": "p" * 2 * MAX, "completion": "c" * 3}, {"prompt": "p", "completion": "c"}]
    datasets = build(path, rows, overlong=overlong)
    assert all(example.num_supervised for example in datasets.train)
    assert len(datasets.train) == (1 if overlong == "truncate" else 2)
    assert datasets.reports[0].overlong == ({"dropped": 1} if overlong == "truncate" else {"split": 1})


def test_nothing_left_is_an_error_with_the_remedy(path):
    message = refusal(path, text_rows([MAX + 1, MAX + 9, MAX + 2]))
    assert str(path) in message
    assert "3 rows" in message
    assert "'dropped': 3" in message
    assert f"data.max_seq_len ({MAX})" in message
    assert "data.overlong" in message


def test_the_report_adds_up(path, rng):
    rows = [
        {"prompt": "p" * rng.randrange(1, 9), "completion": "c" * rng.randrange(1, 2 * MAX)}
        for _ in range(rng.randrange(20, 40))
    ]
    rows.append({"prompt": "p", "completion": "c"})
    datasets = build(path, rows)
    report = datasets.reports[0]
    fitting = [row for row in rows if len(row["prompt"]) + len(row["completion"]) + 2 <= MAX]
    assert (report.source, report.format) == (str(path), "completion")
    assert (report.rows, report.examples) == (len(rows), len(fitting))
    assert report.tokens == sum(len(row["prompt"]) + len(row["completion"]) + 2 for row in fitting)
    assert report.supervised_tokens == sum(len(row["completion"]) + 1 for row in fitting)
    assert json.loads(json.dumps(report.as_dict()))["rows"] == len(rows)


def test_the_summary_tells_the_numbers(path):
    rows = [{"prompt": "abc", "completion": "defg"}, *[{"prompt": "a" * MAX, "completion": "b"}] * 3]
    summary = build(path, rows).reports[0].summary()
    assert str(path) in summary
    assert "4 rows as completion, 1 examples, 9 tokens, 56% supervised, 3 overlong dropped" in summary
    assert "alpaca (the tokenizer has none)" in summary


@pytest.mark.parametrize("num_rows", [1, 5, SHOWN_PROBLEMS, SHOWN_PROBLEMS + 1, 3 * SHOWN_PROBLEMS])
def test_rows_with_nothing_to_learn_are_told_and_counted(path, num_rows):
    good = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    bad = [{"messages": [{"role": "user", "content": "Hi"}]}]
    lines = refusal(path, good + bad * num_rows + good, max_seq_len=500).splitlines()
    shown = min(num_rows, SHOWN_PROBLEMS)
    assert lines[0] == f"{num_rows} of {num_rows + 2} rows can't be used:"
    assert [line.partition(" ")[0] for line in lines[1 : shown + 1]] == [f"{path}:{n + 2}:" for n in range(shown)]
    assert all("no token of this row is supervised" in line for line in lines[1 : shown + 1])
    assert lines[shown + 1 :] == ([f"… and {num_rows - shown} more"] if num_rows > shown else [])


def test_rows_that_are_wrong_in_different_ways_are_told_together(path):
    rows = [
        {"instruction": "A", "output": "B"},
        {"instruction": 3, "output": "B"},
        {"instruction": "A"},
        {"instruction": "A", "output": ["B"]},
    ]
    lines = refusal(path, rows, max_seq_len=500).splitlines()
    assert lines[0].startswith("3 of 4 rows")
    for line, number, column in zip(lines[1:], (2, 3, 4), ("instruction", "response", "output"), strict=True):
        assert line.startswith(f"{path}:{number}: ")
        assert f"'{column}'" in line


def test_what_a_template_refuses_is_told_with_the_row(path, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('only one turn') }}")
    rows = [{"instruction": "A", "output": "B"}]
    message = refusal(path, rows, chat_template=str(template))
    assert f"{path}:1: " in message
    assert "only one turn" in message


def test_a_share_is_held_out_disjoint_and_complete(path, rng):
    num_rows, share = rng.randrange(30, 60), rng.uniform(0.1, 0.6)
    rows = [{"text": f"row {number}"} for number in range(num_rows)]
    everything = build(path, rows)
    split = build(path, None, eval=share, seed=rng.randrange(10**6))
    assert len(split.eval) == round(share * num_rows)
    assert sorted(keys(split.train) + keys(split.eval)) == sorted(keys(everything.train))
    assert set(keys(split.train)).isdisjoint(keys(split.eval))
    assert everything.eval == []


def test_the_seed_alone_decides_what_is_held_out(path, rng):
    build(path, [{"text": f"row {number}"} for number in range(60)])
    seed = rng.randrange(10**6)
    once, again, other = (keys(build(path, None, eval=0.3, seed=each).eval) for each in (seed, seed, seed + 1))
    assert once == again
    assert once != other


def test_a_small_share_still_holds_out_one(path):
    datasets = build(path, [{"text": f"row {number}"} for number in range(5)], eval=0.01)
    assert (len(datasets.train), len(datasets.eval)) == (4, 1)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_holding_out_everything_is_refused(path, num_rows):
    message = refusal(path, [{"text": f"row {number}"} for number in range(num_rows)], eval=0.9)
    assert "data.eval" in message
    assert "0.9" in message


def test_an_eval_file_is_held_out_whole(path, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "completion": f"c{n}"} for n in range(3)])
    datasets = build(path, [{"text": f"row {number}"} for number in range(7)], eval=str(other))
    assert (len(datasets.train), len(datasets.eval)) == (7, 3)
    assert [(report.source, report.format, report.rows) for report in datasets.reports] == [
        (str(path), "text", 7),
        (str(other), "completion", 3),
    ]


def test_a_given_format_beats_the_columns(path):
    rows = [{"instruction": "A", "output": "B", "text": "raw"}]
    datasets = build(path, rows, format="text", max_seq_len=500)
    assert datasets.reports[0].format == "text"
    assert make_tokenizer().decode(datasets.train[0].input_ids) == "<s>raw</s>"


def test_loss_on_reaches_the_examples(path):
    rows = [{"instruction": "A", "output": "B"}]
    of_answer, of_all = (build(path, rows, loss_on=on, max_seq_len=500).train[0] for on in ("assistant", "all"))
    assert of_answer.num_supervised == 2
    assert of_all.num_supervised == len(of_all) - 1
    assert np.array_equal(of_answer.input_ids, of_all.input_ids)


@pytest.fixture
def rewriting(tmp_path):
    """A template that trains a conversation answer by answer."""
    template = tmp_path / "rewriting.jinja"
    template.write_text(REWRITING)
    return str(template)


def conversations(count, answers):
    """Rows whose every token run tells the row: the letter is in each of its contents."""
    return [
        {
            "messages": [
                {"role": role, "content": chr(ord("A") + number) * 3} for role in ("user", "assistant") * answers
            ]
        }
        for number in range(count)
    ]


def test_a_row_with_a_document_per_answer_is_counted_once(path, rewriting):
    rows = [*conversations(3, answers=3), *conversations(2, answers=1)]
    datasets = build(path, rows, max_seq_len=500, chat_template=rewriting)
    assert len(datasets.train) == 3 * 3 + 2
    report = datasets.reports[0]
    assert (report.rows, report.per_answer, report.examples) == (5, 3, 11)
    assert "3 conversations trained answer by answer" in report.summary()
    plain = build(path, None, max_seq_len=500).reports[0]
    assert (plain.per_answer, plain.examples) == (0, 5)
    assert "answer by answer" not in plain.summary()


@pytest.mark.parametrize("kind", ["split", "rewritten"])
def test_no_row_is_learnt_from_and_held_out(path, rewriting, rng, kind):
    num_rows = rng.randrange(6, 20)
    if kind == "split":
        rows = [{"text": chr(ord("A") + number) * (3 * MAX - 2)} for number in range(num_rows)]
        datasets = build(path, rows, overlong="split", eval=0.4, seed=rng.randrange(10**6))
    else:
        settings = {"max_seq_len": 500, "chat_template": rewriting, "eval": 0.4, "seed": rng.randrange(10**6)}
        datasets = build(path, conversations(num_rows, answers=3), **settings)
    decode = make_tokenizer().decode
    learnt, held_out = (
        [frozenset(filter(str.isupper, decode(example.input_ids, skip_special_tokens=True))) for example in examples]
        for examples in (datasets.train, datasets.eval)
    )
    assert {len(letters) for letters in learnt + held_out} == {1}
    assert set(learnt).isdisjoint(held_out)
    assert len(set(held_out)) == round(0.4 * num_rows)
    assert len(held_out) == 3 * round(0.4 * num_rows)
    assert len(learnt) == 3 * (num_rows - round(0.4 * num_rows))


def test_a_single_long_text_is_held_out_by_its_parts(path):
    datasets = build(path, text_rows([10 * MAX]), overlong="split", eval=0.3)
    assert (len(datasets.train), len(datasets.eval)) == (7, 3)


def test_the_digest_tells_data_of_equal_counts_apart(path):
    digests = []
    for rows in ([{"text": "one"}], [{"text": "one"}], [{"text": "two"}]):
        digests.append(build(path, rows).reports[0].digest)
    assert digests[0] == digests[1] != digests[2]
    rows = [{"prompt": "one", "completion": "two"}]
    assert build(path, rows).reports[0].digest != build(path, rows, loss_on="all").reports[0].digest
