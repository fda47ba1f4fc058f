"""Datasets: every row is trained on, truncated, held out or reported."""

import errno
import json
import os
import random
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from qlora.data import EncodeOptions, Source, build_datasets, cache_key, prepare
from qlora.data.problems import SHOWN_EXAMPLES, counted
from qlora.errors import ConfigError, DataError
from tests.tiny import make_tokenizer, only, write_jsonl

MAX = 20
# Requires a document per answer, as it changes earlier answers.
REWRITING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ '<gone>' if m.role == 'assistant' and not loop.last else m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def text_rows(lengths):
    """A row per length; with a byte tokenizer, BOS and EOS it has exactly that many tokens."""
    return [{"text": chr(ord("a") + number % 26) * (length - 2)} for number, length in enumerate(lengths)]


def build(path, rows, eval=0.0, source=None, template="auto", cache=None, seed=0, **options):
    """Data of one file; `source` says how to read it, `options` how to encode it."""
    if rows is not None:
        write_jsonl(path, rows)
    sources = [Source(str(path), **(source or {}))]
    options = EncodeOptions(**{"max_seq_len": MAX, **options})
    return build_datasets(make_tokenizer(), sources, eval, options, template, cache and str(cache), seed)


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


def test_an_overlong_example_is_an_error_if_requested(path):
    assert build(path, text_rows([MAX, 5]), overlong="error").reports[0].examples == 2
    message = refusal(path, text_rows([5, MAX + 3, MAX, MAX + 1]), overlong="error")
    lines = message.splitlines()
    remedy = f"more than data.max_seq_len ({MAX}); raise it, or set data.overlong to drop, truncate or split."
    assert lines[:4] == [
        f"2 of 4 rows of {path} can't be used:",
        f"2 rows: … tokens, {remedy}",
        f"  {path}:2: {MAX + 3} tokens, {remedy}",
        f"  {path}:4: {MAX + 1} tokens, {remedy}",
    ]


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
    assert "3 were too long" in message
    assert f"data.max_seq_len is {MAX}" in message
    assert "data.overlong is drop" in message


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


def test_the_summary_has_the_numbers(path):
    rows = [{"prompt": "abc", "completion": "defg"}, *[{"prompt": "a" * MAX, "completion": "b"}] * 3]
    summary = build(path, rows).reports[0].summary()
    lines = summary.splitlines()
    assert lines[0].startswith(f"{path}: 4 rows as completion, 1 example, 9 tokens, 56% supervised; ")
    assert lines[0].endswith("chat template: alpaca (the tokenizer has none)")
    assert lines[1:] == ["  2 rows equal to an earlier one", "  3 documents dropped because of max_seq_len"]


@pytest.mark.parametrize("num_rows", [1, 2, 41])
def test_a_cause_of_bad_rows_is_named_once_with_its_count_and_examples(path, num_rows):
    good = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    bad = [{"messages": [{"role": "user", "content": "Hi"}]}]
    lines = refusal(path, good + bad * num_rows + good, max_seq_len=500).splitlines()
    shown = [f"  {path}:{number + 2}: {bad[0]}" for number in range(min(num_rows, SHOWN_EXAMPLES))]
    assert lines == [
        f"{num_rows} of {num_rows + 2} rows of {path} can't be used:",
        f"{counted(num_rows, 'row')}: no token of this row is supervised; it needs an answer that is trained on.",
        *shown,
        "To drop such rows, set data.on_bad_row: drop.",
    ]


@pytest.mark.parametrize("num_bad", [1, 25])
def test_bad_rows_of_every_kind_can_be_left_out_and_are_counted(path, rng, num_bad):
    """Lines that aren't JSON, rows that aren't objects, wrong columns and absent answers."""
    good = [json.dumps({"instruction": f"Q{number}", "output": "A" * rng.randrange(1, 9)}) for number in range(5)]
    kinds = {
        '{"instruction": "cut o': "broken JSON",
        "[1, 2]": "a row should be an object",
        '{"instruction": "Q", "output": 3}': "column 'output' should be text",
        '{"instruction": "Q"}': "there is neither",
    }
    bad = rng.choices(list(kinds), k=num_bad)
    lines = [good[0], *rng.sample([*good[1:], *bad], k=num_bad + 4)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = build(path, None, max_seq_len=500, on_bad_row="drop")
    assert len(found.train) == 5
    report = found.reports[0]
    assert (report.rows, report.bad_rows, report.examples) == (5 + num_bad, num_bad, 5)
    assert {problem["cause"][:9]: problem["count"] for problem in report.problems} == {
        kinds[line][:9]: count for line, count in Counter(bad).items()
    }
    for problem in report.problems:
        where = [number for number, line in enumerate(lines, 1) if kinds.get(line, "")[:9] == problem["cause"][:9]]
        assert [text.startswith(f"{path}:{number}") for number, text in zip(where, problem["examples"], strict=False)]
        assert len(problem["examples"]) == min(problem["count"], SHOWN_EXAMPLES)
    assert f"  {counted(num_bad, 'bad row')} dropped" in report.summary().splitlines()


def test_bad_rows_alone_leave_nothing_to_train_on(path):
    message = refusal(path, [{"instruction": "Q"}, {"instruction": "Q", "output": 3}], on_bad_row="drop")
    assert "2 rows, but no example is left to train on" in message
    assert f"{path}:1: " in message
    assert f"{path}:2: " in message
    assert "data.on_bad_row" not in message  # it is set already


def test_the_errors_of_all_sources_are_reported_at_once(path, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", text_rows([5, 6]))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "fine"}, {"text": 3}])
    long = write_jsonl(tmp_path / "long.jsonl", text_rows([MAX + 1]))
    train = [Source(str(each)) for each in (tmp_path / "none.jsonl", good, bad)]
    with pytest.raises(ConfigError) as caught:
        build_datasets(make_tokenizer(), train, [Source(str(long))], EncodeOptions(max_seq_len=MAX))
    message = str(caught.value)
    assert f"not found: {tmp_path / 'none.jsonl'}" in message
    assert f"1 of 2 rows of {bad}" in message
    assert f"{long}: 1 row, but no example" in message
    assert str(good) not in message


def test_a_wrong_mapping_is_reported_with_the_errors_of_other_sources(path, tmp_path):
    mapped = Source(str(write_jsonl(path, text_rows([5]))), columns={"txt": "text"})
    with pytest.raises(ConfigError) as caught:
        build_datasets(make_tokenizer(), [mapped, Source(str(tmp_path / "none.jsonl"))], 0.0, EncodeOptions())
    assert "no format has a column 'txt'" in str(caught.value)
    assert f"not found: {tmp_path / 'none.jsonl'}" in str(caught.value)


def test_rows_that_are_wrong_in_different_ways_are_reported_together(path):
    rows = [
        {"instruction": "A", "output": "B"},
        {"instruction": 3, "output": "B"},
        {"instruction": "A"},
        {"instruction": "A", "output": ["B"]},
        {"instruction": "A", "output": [None]},
    ]
    assert refusal(path, rows, max_seq_len=500).splitlines() == [
        f"4 of 5 rows of {path} can't be used:",
        "2 rows: column 'output' should be text, not …",
        f"  {path}:4: column 'output' should be text, not ['B'].",
        f"  {path}:5: column 'output' should be text, not [None].",
        "1 row: column 'instruction' should be text, not 3.",
        f"  {path}:2: {rows[1]}",
        "1 row: there is neither 'output' nor 'response'.",
        f"  {path}:3: {rows[2]}",
        "To drop such rows, set data.on_bad_row: drop.",
    ]


def test_what_a_template_refuses_is_reported_with_the_row(path, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('only one turn') }}")
    rows = [{"instruction": "A", "output": "B"}]
    message = refusal(path, rows, template=str(template))
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
    assert len(everything.eval) == 0


def test_the_seed_alone_decides_what_is_held_out(path, rng):
    build(path, [{"text": f"row {number}"} for number in range(60)])
    seed = rng.randrange(10**6)
    once, again, other = (keys(build(path, None, eval=0.3, seed=each).eval) for each in (seed, seed, seed + 1))
    assert once == again
    assert once != other


@pytest.mark.parametrize(("num_rows", "share", "num_out"), [
    (3, 0.02, 0), (5, 0.01, 0), (24, 0.02, 0), (26, 0.02, 1), (3, 0.5, 2), (1, 0.5, 0), (4, 0.3, 1),
])  # fmt: skip
def test_a_share_is_of_whole_rows_and_holds_out_none_of_too_few(path, num_rows, share, num_out):
    datasets = build(path, [{"text": f"row {number}"} for number in range(num_rows)], eval=share)
    assert (len(datasets.train), len(datasets.eval)) == (num_rows - num_out, num_out)
    unit = "examples" if num_rows == 1 else "rows"
    notes = [
        f"none of its examples is held out: {share} (data.eval) of {num_rows} {unit} rounds to 0",
        "no example is held out, so there is no evaluation",
    ]
    assert datasets.reports[0].notes == (notes if num_out == 0 else [])


def test_a_source_too_small_to_hold_out_of_leaves_the_evaluation_to_the_others(path, tmp_path):
    small = write_jsonl(path, [{"text": "one"}, {"text": "two"}])
    large = write_jsonl(tmp_path / "large.jsonl", [{"text": f"row {number}"} for number in range(20)])
    built = build_datasets(
        make_tokenizer(), [Source(str(small)), Source(str(large))], 0.1, EncodeOptions(max_seq_len=MAX)
    )
    assert [report.drawn for report in built.reports] == [2, 18]
    assert built.reports[0].notes == ["none of its examples is held out: 0.1 (data.eval) of 2 rows rounds to 0"]
    assert built.reports[1].notes == []
    assert len(built.eval) == 2


@pytest.mark.parametrize("num_rows", [1, 4])
def test_holding_out_everything_is_refused(path, num_rows):
    message = refusal(path, [{"text": f"row {number}"} for number in range(num_rows)], eval=0.9)
    assert "data.eval" in message
    assert f"0.9 of the {num_rows} examples of {path}" in message


def test_an_eval_file_is_held_out_whole(path, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "completion": f"c{n}"} for n in range(3)])
    datasets = build(path, [{"text": f"row {number}"} for number in range(7)], eval=[Source(str(other))])
    assert (len(datasets.train), len(datasets.eval)) == (7, 3)
    assert [(report.source, report.format, report.rows) for report in datasets.reports] == [
        (str(path), "text", 7),
        (str(other), "completion", 3),
    ]
    assert [report.drawn for report in datasets.reports] == [7, 3]
    assert all("an epoch" not in report.summary() for report in datasets.reports)


def test_a_given_format_beats_the_columns(path):
    rows = [{"instruction": "A", "output": "B", "text": "raw"}]
    datasets = build(path, rows, source={"format": "text"}, max_seq_len=500)
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
    """A template that requires a document per answer."""
    template = tmp_path / "rewriting.jinja"
    template.write_text(REWRITING)
    return str(template)


def conversations(count, answers):
    """Rows of which every part shows its row: all contents have the row's letter."""
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
    datasets = build(path, rows, max_seq_len=500, template=rewriting)
    assert len(datasets.train) == 3 * 3 + 2
    report = datasets.reports[0]
    assert (report.rows, report.per_answer, report.examples) == (5, 3, 11)
    assert "3 conversations trained answer by answer" in report.summary()
    plain = build(path, None, max_seq_len=500).reports[0]
    assert (plain.per_answer, plain.examples) == (0, 5)
    assert "answer by answer" not in plain.summary()


@pytest.mark.parametrize("kind", ["split", "rewritten"])
def test_no_row_is_trained_on_and_held_out(path, rewriting, rng, kind):
    num_rows = rng.randrange(6, 20)
    if kind == "split":
        rows = [{"text": chr(ord("A") + number) * (3 * MAX - 2)} for number in range(num_rows)]
        datasets = build(path, rows, overlong="split", eval=0.4, seed=rng.randrange(10**6))
    else:
        settings = {"max_seq_len": 500, "template": rewriting, "eval": 0.4, "seed": rng.randrange(10**6)}
        datasets = build(path, conversations(num_rows, answers=3), **settings)
    decode = make_tokenizer().decode
    trained, held_out = (
        [frozenset(filter(str.isupper, decode(example.input_ids, skip_special_tokens=True))) for example in examples]
        for examples in (datasets.train, datasets.eval)
    )
    assert {len(letters) for letters in trained + held_out} == {1}
    assert set(trained).isdisjoint(held_out)
    assert len(set(held_out)) == round(0.4 * num_rows)
    assert len(held_out) == 3 * round(0.4 * num_rows)
    assert len(trained) == 3 * (num_rows - round(0.4 * num_rows))


def weighted(tmp_path, rng, weights, **settings):
    """Sources of rows that are all different, and what is drawn from each, by row."""
    sources, rows = [], []
    for number, weight in enumerate(weights):
        texts = [f"{chr(ord('A') + number)}{row}" for row in range(rng.randrange(20, 40))]
        file = write_jsonl(tmp_path / f"{number}.jsonl", [{"text": text} for text in texts])
        sources.append(Source(str(file), weight=weight))
        rows.append(texts)
    built = build_datasets(make_tokenizer(), sources, **{"options": EncodeOptions(max_seq_len=MAX), **settings})
    decode = make_tokenizer().decode
    drawn, out = ([Counter() for _ in weights] for _ in range(2))
    for counts, examples in ((drawn, built.train), (out, built.eval)):
        for example in examples:
            text = decode(example.input_ids, skip_special_tokens=True)
            counts[ord(text[0]) - ord("A")][text] += 1
    return rows, drawn, out, built


def test_an_epoch_sees_a_source_as_often_as_its_weight_says(tmp_path, rng):
    weights = [1, 3, 0.5, 2.25]
    rows, drawn, _, built = weighted(tmp_path, rng, weights)
    for texts, counts, weight, report in zip(rows, drawn, weights, built.reports, strict=True):
        whole, part = int(weight), round(weight % 1 * len(texts))
        assert set(counts) <= set(texts)
        times = Counter(counts[text] for text in texts)
        assert times == Counter({whole: len(texts) - part, whole + 1: part}) - Counter()
        assert (report.examples, report.drawn) == (len(texts), counts.total())
    assert len(built.train) == sum(report.drawn for report in built.reports)
    assert f", {built.reports[1].drawn} of them an epoch, " in built.reports[1].summary()
    assert built.train.lengths.tolist() == [len(example) for example in built.train]


def test_the_seed_decides_what_a_weight_leaves_out(tmp_path, rng):
    once, again, other = (weighted(tmp_path, random.Random(1), [0.5, 0.5], seed=seed)[1] for seed in (3, 3, 4))
    assert once == again
    assert once != other


def test_a_weight_repeats_nothing_that_is_held_out(tmp_path, rng):
    rows, drawn, out, _ = weighted(tmp_path, rng, [2, 0.5], eval=0.25)
    for texts, trained, held_out, weight in zip(rows, drawn, out, (2, 0.5), strict=True):
        assert set(held_out.values()) == {1}
        assert len(held_out) == round(0.25 * len(texts))
        assert set(trained).isdisjoint(held_out)
        assert trained.total() == round(weight * (len(texts) - len(held_out)))


def test_a_small_weight_still_draws_one(tmp_path, rng):
    _, drawn, _, _ = weighted(tmp_path, rng, [1, 0.001])
    assert drawn[1].total() == 1


def test_sources_are_read_each_in_its_own_way(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [{"question": "Q", "answer": "A"}])
    second = tmp_path / "second.txt"
    second.write_text("one\ntwo\n", encoding="utf-16")
    sources = [
        Source(str(first), format="alpaca", columns={"instruction": "question", "output": "answer"}),
        Source(str(second), type="lines", encoding="utf-16"),
    ]
    built = build_datasets(make_tokenizer(), sources, options=EncodeOptions(max_seq_len=500))
    decode = make_tokenizer().decode
    assert [report.format for report in built.reports] == ["alpaca", "text"]
    assert decode(built.train[0].input_ids[built.train[0].loss_mask]) == "A</s>"
    assert [decode(example.input_ids) for example in built.train[1:]] == ["<s>one</s>", "<s>two</s>"]


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split", "error"])
def test_overlong_examples_are_always_counted(path, lengths, overlong):
    """Every row is kept whole or counted."""
    built = build(path, text_rows(lengths), overlong=overlong, on_bad_row="drop")
    report, num_long = built.reports[0], sum(length > MAX for length in lengths)
    counted = sum(report.overlong.values()) + report.bad_rows
    assert counted == num_long
    assert report.rows == len(lengths)
    if overlong != "error":  # before any was cut
        assert report.lengths["longest"] == max(lengths)
        assert sum(count for _, count in report.histogram) == len(lengths)
        assert sum(count for edge, count in report.histogram if edge > MAX) == num_long


def test_rows_that_say_the_same_are_counted_and_kept(path, rng):
    texts = [f"text {number}" for number in range(rng.randrange(3, 9))]
    repeats = rng.choices(texts, k=rng.randrange(1, 9))
    built = build(path, [{"text": text} for text in texts + repeats])
    assert built.reports[0].duplicates == len(repeats)
    assert len(built.train) == len(texts) + len(repeats)


def test_rows_of_one_prompt_and_different_answers_are_no_duplicates(path):
    rows = [{"prompt": "p", "completion": answer} for answer in ("a", "b", "a")]
    assert build(path, rows).reports[0].duplicates == 1


def test_columns_that_are_not_read_are_reported(path):
    report = build(path, [{"text": "a", "source": "web"}, {"text": "b", "id": 3}]).reports[0]
    assert report.unread_columns == ["id", "source"]
    assert "  columns not read: id, source" in report.summary().splitlines()


def test_keys_of_turns_that_are_not_read_and_control_tokens_are_reported(path):
    turns = [{"role": "user", "content": "a</s>b", "lang": "en"}, {"role": "assistant", "content": "c", "los": 0}]
    report = build(path, [{"messages": turns}] * 3, template="chatml", max_seq_len=200).reports[0]
    assert report.unread_keys == ["lang", "los"]
    assert report.control_tokens == {"</s>": 3}


def test_answers_without_text_are_counted(path):
    rows = [{"instruction": "Q", "output": answer} for answer in ("A", "", " ", "B")]
    assert build(path, rows, max_seq_len=500).reports[0].empty_answers == 2


def test_only_the_last_answer_is_supervised_if_requested(path):
    rows = conversations(1, answers=3)
    of_all, of_last = (only(list(build(path, rows, max_seq_len=500, loss_on=on).train)) for on in ("assistant", "last"))
    assert np.array_equal(of_all.input_ids, of_last.input_ids)
    assert of_all.num_supervised == 3 * of_last.num_supervised
    assert of_last.loss_mask[-of_last.num_supervised :].all()


def test_the_weights_of_turns_reach_the_tokens(path):
    turns = [
        {"role": "user", "content": "Q"}, {"role": "assistant", "content": "AAAA", "weight": 0},
        {"role": "user", "content": "Q"}, {"role": "assistant", "content": "BBBB", "weight": 0.5},
    ]  # fmt: skip
    example = only(list(build(path, [{"messages": turns}], max_seq_len=500).train))
    trained = make_tokenizer().decode(example.input_ids[example.loss_mask])
    assert trained == "BBBB</s>"
    assert example.total_weight == 0.5 * example.num_supervised


def test_many_rows_are_tokenized_in_batches_in_their_order(path, rng, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr(prepare.ExampleEncoder, "batch_rows", 7)
    sizes, original = [], prepare.ExampleEncoder.begin

    def begin(self, examples):
        sizes.append(len(examples))
        return original(self, examples)

    monkeypatch.setattr(prepare.ExampleEncoder, "begin", begin)
    texts = ["x" * rng.choice([1, 5, 14]) + str(number) for number in range(40)]
    built = build(path, [{"text": text} for text in texts])
    assert max(sizes) <= 7
    assert sum(sizes) == 40
    decode = make_tokenizer().decode
    assert [decode(example.input_ids, skip_special_tokens=True) for example in built.train] == texts


def test_a_single_long_text_is_held_out_by_its_parts(path):
    datasets = build(path, text_rows([10 * MAX]), overlong="split", eval=0.3)
    assert (len(datasets.train), len(datasets.eval)) == (7, 3)


def test_data_with_equal_counts_have_different_digests(path):
    digests = []
    for rows in ([{"text": "one"}], [{"text": "one"}], [{"text": "two"}]):
        digests.append(build(path, rows).reports[0].digest)
    assert digests[0] == digests[1] != digests[2]
    rows = [{"prompt": "one", "completion": "two"}]
    assert build(path, rows).reports[0].digest != build(path, rows, loss_on="all").reports[0].digest


@pytest.fixture
def no_tokenizing(monkeypatch):
    """Makes every attempt to encode an example fail."""
    return lambda: monkeypatch.setattr(prepare.ExampleEncoder, "begin", None)


def test_cached_data_is_found_and_not_tokenized_again(path, tmp_path, rng, no_tokenizing):
    rows = [{"text": f"row {number}" * rng.randrange(1, 9)} for number in range(30)]
    first = build(path, rows, cache=tmp_path / "cache", eval=0.2, overlong="split")
    no_tokenizing()
    again = build(path, None, cache=tmp_path / "cache", eval=0.2, overlong="split")
    for before, now in ((first.train, again.train), (first.eval, again.eval)):
        assert [(one.input_ids.tobytes(), one.weights.tobytes()) for one in before] == [
            (one.input_ids.tobytes(), one.weights.tobytes()) for one in now
        ]
    assert [asdict(report) for report in again.reports] == [asdict(report) for report in first.reports]
    with pytest.raises(TypeError):  # what is not kept can't be had without
        build(path, [{"text": "other"}], cache=tmp_path / "cache")


CHANGES = {
    "loss_on": {"loss_on": "all"},
    "max_seq_len": {"max_seq_len": MAX + 1},
    "overlong": {"overlong": "truncate"},
    "format": {"source": {"format": "completion"}},
    "columns": {"source": {"columns": {"completion": "answer"}}},
    "roles": {"source": {"roles": {"bot": "assistant"}}},
    "max_rows": {"source": {"max_rows": 1}},
    "encoding": {"source": {"encoding": "latin-1"}},
    "template": {"template": "chatml"},
}
ROWS = [{"prompt": "p", "completion": "c"}]


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_setting_makes_an_entry_of_its_own(path, tmp_path, change):
    cache = tmp_path / "cache"
    build(path, ROWS, cache=cache)
    before = entries(cache)
    build(path, None, cache=cache)
    assert entries(cache) == before
    build(path, None, cache=cache, **change)
    assert len(entries(cache)) == 2
    assert set(before) < set(entries(cache))


@pytest.mark.parametrize("change", [{"seed": 1}, {"eval": 0.5}, {"source": {"weight": 2}}], ids=str)
def test_what_is_drawn_makes_no_entry_of_its_own(path, tmp_path, change, no_tokenizing):
    build(path, ROWS * 4, cache=tmp_path / "cache")
    no_tokenizing()
    build(path, None, cache=tmp_path / "cache", **change)
    assert len(entries(tmp_path / "cache")) == 1


def test_another_file_or_another_content_makes_an_entry_of_its_own(path, tmp_path):
    cache = tmp_path / "cache"
    build(path, [{"text": "one"}], cache=cache)
    trained = only(list(build(path, [{"text": "two"}], cache=cache).train))
    assert make_tokenizer().decode(trained.input_ids) == "<s>two</s>"
    build(tmp_path / "other.jsonl", [{"text": "two"}], cache=cache)
    assert len(entries(cache)) == 3


def test_another_tokenizer_makes_an_entry_of_its_own(path, tmp_path):
    write_jsonl(path, ROWS)
    own_eos, own_template = make_tokenizer(), make_tokenizer(chat_template=REWRITING)
    own_eos.eos_token = "<|im_end|>"
    for count, tokenizer in enumerate((make_tokenizer(), make_tokenizer(add_bos=False), own_eos, own_template), 1):
        build_datasets(tokenizer, [Source(str(path))], cache_dir=str(tmp_path / "cache"))
        assert len(entries(tmp_path / "cache")) == count


def test_another_version_of_what_tokenizes_makes_an_entry_of_its_own(path, tmp_path, monkeypatch):
    build(path, ROWS, cache=tmp_path / "cache")
    monkeypatch.setattr(cache_key, "_hash_of_code", lambda: "other")
    build(path, None, cache=tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 2


def test_a_source_that_holds_nothing_to_train_on_leaves_nothing_in_the_cache(path, tmp_path):
    assert "no example is left" in refusal(path, [{"text": 2}, {"text": 3}], cache=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_bad_rows_are_reported_again_and_dropped_without_tokenizing_again(path, tmp_path, no_tokenizing):
    cache = tmp_path / "cache"
    first = refusal(path, [{"text": "a"}, {"text": 3}], cache=cache)
    assert "1 of 2 rows" in first
    no_tokenizing()
    assert refusal(path, None, cache=cache) == first
    assert build(path, None, cache=cache, on_bad_row="drop").reports[0].bad_rows == 1


def test_a_file_that_changes_while_it_is_read_is_not_kept(path, tmp_path, monkeypatch):
    original = prepare.ExampleEncoder.begin

    def begin(self, examples):
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
        return original(self, examples)

    monkeypatch.setattr(prepare.ExampleEncoder, "begin", begin)
    assert "changed while it was read" in refusal(path, [{"text": "a"}], cache=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_unknown_columns_are_reported_once_for_every_on_bad_row(path):
    rows = [{"question": str(number), "answer": "a"} for number in range(9)]
    for on_bad_row in ("error", "drop"):
        message = refusal(path, rows, on_bad_row=on_bad_row)
        assert message.count("no format has the columns ['answer', 'question']") == 1


def test_the_first_row_whose_columns_mean_something_decides_the_format(path):
    report = build(path, [{"id": 1}, {"text": "a"}, {"text": "b"}], on_bad_row="drop").reports[0]
    assert (report.format, report.bad_rows, report.examples) == ("text", 1, 2)


@pytest.mark.parametrize(("max_rows", "num_read"), [(1, 1), (4, 4), (9, 9), (10, 9), (None, 9)])
def test_the_first_rows_alone_are_read_if_requested(path, max_rows, num_read):
    rows = [{"text": f"row {number}"} for number in range(9)]
    built = build(path, rows, source={"max_rows": max_rows})
    assert keys(built.train) == keys(build(path, rows).train)[:num_read]
    report = built.reports[0]
    assert (report.rows, report.examples) == (num_read, num_read)
    note = f"max_rows: at most {num_read} rows were read"
    assert report.notes == ([note] if max_rows == num_read else [])


def test_bad_rows_count_as_read(path):
    rows = [{"text": "a"}, {"text": 3}, {"text": "b"}, {"text": 4}]
    report = build(path, rows, source={"max_rows": 3}, on_bad_row="drop").reports[0]
    assert (report.rows, report.bad_rows, report.examples) == (3, 1, 2)


def test_no_more_of_a_file_is_read_than_its_first_rows(path, tmp_path, monkeypatch):
    """Neither to tokenize it nor to name its entry: the rest of the file isn't accessed."""
    lines = [json.dumps({"text": f"row {number}"}) for number in range(1000)]
    path.write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(cache_key.hashlib, "file_digest", None)
    taken, original = [], prepare.read_rows

    def read_rows(*arguments):
        for row in original(*arguments):
            taken.append(row.origin)
            yield row

    monkeypatch.setattr(prepare, "read_rows", read_rows)
    cache = tmp_path / "cache"
    built = build(path, None, cache=cache, source={"max_rows": 3})
    assert len(built.train) == len(taken) == 3
    build(path, None, cache=cache, source={"max_rows": 3})
    assert len(taken) == 3
    path.write_text("\n".join(lines[1:] + lines[:1]), encoding="utf-8")  # of the same size
    assert keys(build(path, None, cache=cache, source={"max_rows": 3}).train)[:2] == keys(built.train)[1:]


def test_a_share_is_held_out_of_the_rows_that_are_read(path):
    rows = [{"text": f"row {number}"} for number in range(50)]
    built = build(path, rows, source={"max_rows": 10}, eval=0.2)
    assert sorted(keys(built.train) + keys(built.eval)) == sorted(keys(build(path, rows[:10]).train))
    assert len(built.eval) == 2


@pytest.mark.parametrize(("split", "read", "left_out"), [
    ("test", "test-easy.jsonl, test-hard.jsonl", "train.jsonl"),
    (None, "train.jsonl", "test-easy.jsonl, test-hard.jsonl"),
])  # fmt: skip
def test_the_files_of_a_folder_that_are_read_are_named_and_the_others_too(tmp_path, split, read, left_out):
    (tmp_path / "data").mkdir()
    for name in ("train", "test-easy", "test-hard"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [{"text": name}])
    report = build(tmp_path / "data", None, source={"split": split}).reports[0]
    assert report.notes == [f"files read: {read}", f"files ignored: {left_out}"]


def test_a_split_of_a_single_file_is_reported_as_not_used(path):
    assert build(path, [{"text": "a"}], source={"split": "test"}).reports[0].notes == [
        "split 'test' is ignored, as rows.jsonl is a single file"
    ]


def test_without_a_folder_of_its_own_the_users_cache_is_taken(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build(path, ROWS)
    assert len(entries(tmp_path / "xdg" / "qlora" / "data")) == 1


def test_a_file_that_can_not_be_read_is_reported(path, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cache_key.hashlib, "file_digest", refuse)
    assert refusal(path, ROWS, cache=tmp_path / "cache") == f"{path} can't be read: {os.strerror(errno.EIO)}."
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "wrong", [{"loss_on": "answers"}, {"overlong": "cut"}, {"on_bad_row": "skip"}, {"max_seq_len": 0}]
)
def test_unknown_options_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"^{only(list(wrong))}: "):
        EncodeOptions(**wrong)
