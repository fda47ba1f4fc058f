"""Duplicates: removed if requested, over all sources, and never both trained on and held out."""

import random

import pytest

from qlora.data import EncodeOptions, Source, build_datasets
from qlora.data.problems import counted
from qlora.errors import DataError
from tests.tiny import make_tokenizer, write_jsonl

MAX = 24


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def build(tmp_path):
    """Builds datasets from the rows of each source; a string is a row of text."""

    def file(name, rows):
        return write_jsonl(tmp_path / f"{name}.jsonl", [{"text": row} if isinstance(row, str) else row for row in rows])

    def build(train, eval=0.0, weights=None, deduplicate=True, seed=0, **options):
        train = [Source(str(file(f"train{n}", rows)), weight=(weights or {}).get(n, 1)) for n, rows in enumerate(train)]
        if isinstance(eval, list):
            eval = [Source(str(file("eval", eval)))]
        options = EncodeOptions(**{"max_seq_len": MAX, **options})
        cache = str(tmp_path / "cache")
        return build_datasets(make_tokenizer(), train, eval, options, "auto", cache, seed, deduplicate)

    return build


def keys(examples):
    return [(tuple(example.input_ids.tolist()), tuple(example.weights.tolist())) for example in examples]


def texts(examples):
    return [make_tokenizer().decode(example.input_ids, skip_special_tokens=True) for example in examples]


def test_the_first_of_each_is_kept_over_all_sources_in_their_order(build, rng):
    pool = [f"row {number}" for number in range(30)]
    sources = [rng.choices(pool, k=rng.randrange(5, 40)) for _ in range(3)]
    built = build(sources)
    wanted = list(dict.fromkeys(text for source in sources for text in source))
    assert texts(built.train) == wanted
    seen = set()
    for source, report in zip(sources, built.reports, strict=True):
        new = set(source) - seen
        seen |= new
        assert (report.examples, report.deduplicated, report.drawn) == (len(source), len(source) - len(new), len(new))
        line = f"  {counted(len(source) - len(new), 'example')} removed, equal to an earlier or a held-out one"
        assert (line in report.summary().splitlines()) is (len(new) < len(source))


def test_nothing_is_left_out_unless_asked_for(build):
    built = build([["a", "b", "a"], ["b"]], deduplicate=False)
    assert texts(built.train) == ["a", "b", "a", "b"]
    assert [report.deduplicated for report in built.reports] == [0, 0]


def test_training_gives_way_to_what_is_held_out_in_a_file(build, rng):
    held_out = [f"row {number}" for number in rng.sample(range(30), k=9)]
    built = build([[f"row {number}" for number in range(30)]], eval=[*held_out, held_out[0], "only here"])
    assert texts(built.eval) == [*held_out, "only here"]
    assert texts(built.train) == [f"row {number}" for number in range(30) if f"row {number}" not in held_out]
    assert [(report.examples, report.deduplicated, report.drawn) for report in built.reports] == [
        (30, 9, 21), (11, 1, 10),
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_example_is_trained_on_and_held_out(build, rng, share):
    sources = [rng.choices([f"row {number}" for number in range(40)], k=60) for _ in range(2)]
    seed = rng.randrange(10**6)
    built = build(sources, eval=share, seed=seed)
    assert set(texts(built.train)).isdisjoint(texts(built.eval))
    assert sorted(texts(built.train) + texts(built.eval)) == sorted({*sources[0], *sources[1]})
    leaking = build(sources, eval=share, seed=seed, deduplicate=False)
    assert set(texts(leaking.train)) & set(texts(leaking.eval))  # so there was something to see to


def test_a_weight_repeats_what_is_left(build):
    built = build([["a", "a", "b"], ["a", "c"]], weights={0: 2})
    assert texts(built.train) == ["a", "b", "a", "b", "c"]


def test_the_same_tokens_with_other_weights_are_no_duplicate(build):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "abc", "completion": "d"},  # the same tokens, of which fewer are supervised
        {"prompt": "ab", "completion": "cd", "note": "the same again"},
    ]
    built = build([rows])
    assert built.reports[0].deduplicated == 1
    assert [example.num_supervised for example in built.train] == [3, 2]


def test_documents_are_compared_as_they_are_trained_on(build):
    """Rows that differ only after the truncation are equal, and so are equal parts of split ones."""
    rows = ["x" * MAX + "one", "x" * MAX + "another"]
    assert build([rows], overlong="truncate").reports[0].deduplicated == 1
    parts = build([["y" * (3 * MAX - 1) + "z"]], overlong="split")
    assert (parts.reports[0].examples, parts.reports[0].deduplicated) == (4, 1)
    assert len(set(keys(parts.train))) == len(parts.train) == 3


def test_the_cache_serves_both_ways(build, tmp_path):
    sources = [["a", "b", "a"]]
    digests = {build(sources, deduplicate=each).reports[0].digest for each in (True, False, True)}
    assert len(digests) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_training_set_that_is_held_out_whole_is_refused(build):
    with pytest.raises(DataError, match="every training example is also in data.eval"):
        build([["a", "b"], ["b"]], eval=["b", "a", "c"])


def test_a_source_that_others_hold_already_adds_nothing(build):
    built = build([["a", "b"], ["b", "a"]], eval=0.5)
    assert built.reports[1].drawn == 0
    assert len(built.train) == len(built.eval) == 1
