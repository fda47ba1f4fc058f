"""Groups of documents, here preference pairs: never parted, dropped, truncated or held out on one side."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from qlora.data import BatchPlan, EncodeOptions, Source, build_datasets, eval_batches
from qlora.errors import DataError
from tests.tiny import make_tokenizer, only, write_jsonl

MAX = 200


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def pair(number, chosen="yes", rejected="no"):
    """A preference whose prompt, and thus both documents, are its own."""
    return {"prompt": f"Q{number:03}", "chosen": chosen, "rejected": rejected}


def random_pairs(rng, count):
    return [pair(number, "c" * rng.randrange(1, 60), "r" * rng.randrange(1, 60)) for number in range(count)]


@pytest.fixture
def build(tmp_path):
    """Builds data of files that are given by their rows."""

    def build(*files, eval=0.0, seed=0, deduplicate=False, max_rows=None, weight=1, **options):
        sources = [
            Source(str(write_jsonl(tmp_path / f"rows{number}.jsonl", rows)), max_rows=max_rows, weight=weight)
            for number, rows in enumerate(files)
        ]
        if isinstance(eval, list):
            eval = [Source(str(write_jsonl(tmp_path / "eval.jsonl", eval)))]
        options = EncodeOptions(**{"max_seq_len": MAX, **options})
        return build_datasets(
            make_tokenizer(), sources, eval, options, cache_dir=str(tmp_path / "cache"), seed=seed,
            deduplicate=deduplicate,
        )  # fmt: skip

    return build


def pairs_of(examples):
    """Texts of the documents, two by two."""
    texts = [make_tokenizer().decode(example.input_ids, skip_special_tokens=True) for example in examples]
    return list(zip(texts[::2], texts[1::2], strict=True))


def prompts_of(examples):
    """Prompt of each pair; both sides must have the same."""
    found = []
    for sides in pairs_of(examples):
        found.append(only({side[side.index("Q") : side.index("Q") + 4] for side in sides}))
    return found


def test_a_preference_is_a_group_of_its_chosen_and_rejected_answer(build, rng):
    built = build([pair(number) for number in range(5)])
    assert built.train.group_size == 2
    assert prompts_of(built.train) == [f"Q{number:03}" for number in range(5)]
    assert all(chosen.endswith("yes") and rejected.endswith("no") for chosen, rejected in pairs_of(built.train))
    assert built.reports[0].examples == built.reports[0].drawn == 10
    assert built.train.rows_of([0, 1, 6]) == {0: [1, 4]}
    assert build([{"text": "a"}]).train.group_size == 1


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_with_one_overlong_side_is_dropped_whole_and_both_sides_are_counted(build, side):
    rows = [pair(0), pair(1) | {side: "x" * MAX}, pair(2)]
    built = build(rows)
    assert prompts_of(built.train) == ["Q000", "Q002"]
    report = built.reports[0]
    assert (report.overlong, report.examples) == ({"dropped": 2}, 4)
    assert report.tokens == sum(map(len, built.train))


def test_truncated_pairs_stay_pairs(build):
    long_prompt = pair(1) | {"prompt": "Q001" + "x" * MAX}  # no answer is left of it
    rows = [pair(0), long_prompt, pair(2, rejected="x" * MAX), pair(3, "y" * MAX, "x" * MAX)]
    built = build(rows, overlong="truncate")
    assert prompts_of(built.train) == ["Q000", "Q002", "Q003"]
    assert built.train.lengths.tolist()[2:] == [len(built.train[2]), MAX, MAX, MAX]
    assert built.reports[0].overlong == {"dropped": 2, "truncated": 4}


def test_a_pair_of_which_truncation_leaves_one_answer_is_dropped_whole(build):
    history = [{"role": "user", "content": "Q001"}]
    later = [*history, {"role": "assistant", "content": "z" * MAX}, {"role": "user", "content": "so?"}]
    answer = {"role": "assistant", "content": "r"}
    rows = [{"chosen": [*history, answer], "rejected": [*later, answer]}, {"chosen": [*history, answer]}]
    rows[1]["rejected"] = [*history, {"role": "assistant", "content": "no"}]
    built = build(rows, overlong="truncate")
    assert built.reports[0].overlong == {"dropped": 2}
    assert len(built.train) == 2


@pytest.mark.parametrize(("overlong", "reason"), [("split", ", as rated answers can't be split."), ("error", "")])
def test_an_overlong_pair_is_refused_where_it_would_be_split_or_an_error(build, overlong, reason):
    rows = [pair(0), pair(1, chosen="x" * MAX)]
    with pytest.raises(DataError, match=f"more than data.max_seq_len .* drop or truncate{reason}"):
        build(rows, overlong=overlong)
    built = build(rows, overlong=overlong, on_bad_row="drop")
    assert prompts_of(built.train) == ["Q000"]
    assert (built.reports[0].bad_rows, built.reports[0].overlong) == (1, {})


def test_the_first_rows_are_whole_pairs(build):
    assert prompts_of(build([pair(number) for number in range(9)], max_rows=4).train) == [
        f"Q{number:03}" for number in range(4)
    ]


def test_repeats_are_those_of_whole_pairs(build):
    rows = [pair(0), pair(1), pair(0), pair(1, rejected="another")]
    built = build(rows, [pair(1), pair(2)], deduplicate=True)
    assert prompts_of(built.train) == ["Q000", "Q001", "Q001", "Q002"]
    assert [(one.examples, one.deduplicated, one.drawn) for one in built.reports] == [(8, 2, 6), (4, 2, 2)]
    assert pairs_of(built.train)[2][1].endswith("another")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_pair_is_trained_on_or_held_out_whole(build, rng, share):
    built = build(random_pairs(rng, 20), eval=share, seed=rng.randrange(10**6))
    train, held_out = prompts_of(built.train), prompts_of(built.eval)
    assert len(held_out) == share * 20
    assert sorted(train + held_out) == [f"Q{number:03}" for number in range(20)]
    assert built.reports[0].drawn == len(built.train) == 2 * len(train)


def test_a_weight_repeats_whole_pairs(build, rng):
    counts = Counter(prompts_of(build(random_pairs(rng, 10), weight=1.5).train))
    assert Counter(counts.values()) == {1: 5, 2: 5}


def test_pairs_are_not_mixed_with_single_documents_in_one_set(build):
    single = [{"instruction": "Q", "output": "A"}]
    with pytest.raises(DataError, match=r"rows0.jsonl \(preference\) and .*rows1.jsonl \(alpaca\) can't be mixed"):
        build([pair(0), pair(1)], single)
    built = build([pair(0), pair(1)], eval=single)
    assert (built.train.group_size, built.eval.group_size) == (2, 1)


def group_lengths(rng, count):
    return np.array([rng.randrange(1, 65) for _ in range(2 * count)])


def plans(rng, capacity, world_size=1):
    lengths = group_lengths(rng, rng.randrange(20, 40))
    plan = BatchPlan(
        lengths, rng.randrange(1, 4), rng.randrange(1, 4), capacity, rng.randrange(10**6), 0, world_size, group_size=2
    )
    return [replace(plan, rank=rank) for rank in range(world_size)]


def assert_whole(indices):
    """Chosen and rejected follow each other."""
    assert all(
        first % 2 == 0 and second == first + 1 for first, second in zip(indices[::2], indices[1::2], strict=True)
    )


CAPACITIES = pytest.mark.parametrize("capacity", [None, 64], ids=["apart", "packed"])


@CAPACITIES
@pytest.mark.parametrize("num_parts", [1, 2, 3, 50])
def test_no_micro_batch_or_part_of_one_parts_a_pair(rng, capacity, num_parts):
    (plan,) = plans(rng, capacity)
    seen = []
    for step in range(plan.steps_per_epoch):
        batches = plan.micro_batches(step, num_parts)
        for batch in batches:
            assert batch
            assert_whole(batch)
        assert [index for batch in batches for index in batch] == plan.window(step)
        seen += plan.window(step)
    assert sorted(seen) == list(range(len(plan.lengths)))
    assert_whole(plan.largest_micro_batch())
    finest = [batch for step in range(plan.steps_per_epoch) for batch in plan.micro_batches(step, plan.max_parts)]
    assert {len(batch) for batch in finest} == {2}


@CAPACITIES
def test_no_pair_is_shared_by_processes(rng, capacity):
    shares = plans(rng, capacity, world_size=3)
    for step in range(2 * shares[0].steps_per_epoch):
        own = [[index for batch in plan.micro_batches(step) for index in batch] for plan in shares]
        for each in own:
            assert_whole(each)
        assert sorted(sum(own, [])) == sorted(shares[0].window(step))


def test_packed_rows_have_room_for_both_sides_of_the_longest_pair(rng):
    (plan,) = plans(rng, capacity=64)
    totals = [sum(plan.lengths[index] for index in row) for row in plan.rows]
    for row in plan.rows:
        assert_whole(row)
    assert max(totals) <= 2 * 64
    assert plan.fill == pytest.approx(sum(totals) / (2 * 64 * len(totals)))
    full = BatchPlan(np.array([64, 64, 64, 64]), 1, 1, capacity=64, group_size=2)
    assert list(full.rows) == [[0, 1], [2, 3]]


def test_without_packing_a_row_is_a_pair(rng):
    plan = BatchPlan(group_lengths(rng, 12), 3, 2, seed=rng.randrange(10**6), group_size=2)
    assert plan.steps_per_epoch == 2
    assert [len(batch) for batch in plan.micro_batches(0)] == [6, 6]
    totals = [int(plan.lengths[first] + plan.lengths[second]) for first, second in np.reshape(plan.window(0), (-1, 2))]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("capacity", [None, MAX])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_keeps_pairs_together_and_sees_each_once(build, rng, capacity, batch_size):
    examples = build(random_pairs(rng, 11)).train
    sides = [example.input_ids.tolist() for example in examples]
    expected = sorted(zip(sides[::2], sides[1::2], strict=True))
    seen = []
    for batch in eval_batches(examples, batch_size, capacity):
        ids = batch.input_ids.flatten().tolist()
        width = batch.input_ids.shape[1]
        begins = batch.cu_seq_lens.tolist()[:-1] if capacity else [row * width for row in range(len(batch.lengths))]
        documents = [ids[begin : begin + length] for begin, length in zip(begins, batch.lengths, strict=True)]
        seen += zip(documents[::2], documents[1::2], strict=True)
    assert sorted(seen) == expected


def rated(number, label=True, answer="yes"):
    return {"prompt": f"Q{number:03}", "completion": answer, "label": label}


def test_a_rated_answer_has_a_group_with_its_prompt_and_the_answer_to_the_prompt_before(build):
    built = build([rated(0, answer="zero"), rated(1, False, "one"), rated(2, answer="two")])
    answers = [(own.splitlines()[-1], other.splitlines()[-1]) for own, other in pairs_of(built.train)]
    assert answers == [("zero", "one"), ("one", "zero"), ("two", "one")]
    assert prompts_of(built.train) == ["Q000", "Q001", "Q002"]
    assert [int(example.values["rating"]) for example in built.train] == [1, 0, -1, 0, 1, 0]


def test_mismatched_answers_are_truncated_and_do_not_make_rows_different(build):
    rows = [rated(0), rated(1, answer="y" * (MAX - 40)), rated(2), rated(0), rated(0)]
    built = build(rows, deduplicate=True, max_seq_len=MAX)
    assert max(map(len, built.train)) <= MAX
    assert prompts_of(built.train) == ["Q000", "Q001", "Q002"]
    assert built.reports[0].deduplicated == 4


def test_rated_answers_to_a_single_prompt_are_refused(build):
    with pytest.raises(DataError, match="all rows have the same prompt; add rows with another"):
        build([rated(0), rated(0, False, "no")])


def test_an_answer_to_the_same_prompt_is_no_mismatched_one(build):
    rows = [rated(0, answer="a"), rated(0, False, "b"), rated(1, answer="c"), rated(1, False, "d"), rated(2)]
    pairs = pairs_of(build(rows).train)
    assert [(own.splitlines()[-1], other.splitlines()[-1]) for own, other in pairs] == [
        ("a", "c"), ("b", "c"), ("c", "b"), ("d", "b"), ("yes", "d"),
    ]  # fmt: skip
    assert all(own.splitlines()[:-1] == other.splitlines()[:-1] for own, other in pairs)
