"""Batches: labels, padding, and an order in which every example is seen once an epoch."""

import random
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from qlora.data import IGNORE_INDEX, BatchPlan, collate, eval_batches
from qlora.data.tokens import make_example


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def random_example(rng, vocabulary=9, longest=30):
    """Few different tokens, so that token 0, with which a batch is padded, is often a real one."""
    length = rng.randrange(2, longest)
    return make_example(rng.choices(range(vocabulary), k=length), [rng.random() < 0.6 for _ in range(length)])


CAPACITIES = pytest.mark.parametrize("capacity", [None, 64], ids=["apart", "packed"])


def random_lengths(rng, count=None):
    return np.array([rng.randrange(1, 65) for _ in range(count or rng.randrange(30, 60))])


def random_plan(rng, capacity=None, **fixed):
    """A plan over a few epochs of a few steps."""
    lengths = random_lengths(rng)
    return BatchPlan(
        lengths, rng.randrange(1, 5), rng.randrange(1, 4), capacity, **{"seed": rng.randrange(10**6), **fixed}
    )


def replaced(plan, **changes):
    """A new plan with some settings changed."""
    names = ("lengths", "micro_batch_size", "gradient_accumulation_steps", "capacity", "seed", "rank", "world_size")
    return BatchPlan(**{name: getattr(plan, name) for name in names} | changes)


def epoch_order(plan, epoch=0):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [index for step in steps for index in plan.window(step)]


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_a_selection_is_the_batch_of_the_selected_documents(rng, packed):
    examples = [replace(random_example(rng), values={"rating": number}) for number in range(rng.randrange(1, 7))]
    chosen = rng.sample(range(len(examples)), rng.randrange(1, len(examples) + 1))
    found = collate(examples, packed, seeds=range(len(examples))).select(chosen)
    wanted = collate([examples[each] for each in chosen], packed, seeds=chosen)
    for each in fields(wanted):
        if each.name != "weights":
            assert str(getattr(found, each.name)) == str(getattr(wanted, each.name)), each.name


def test_labels_are_the_supervised_next_tokens(rng):
    examples = [random_example(rng) for _ in range(rng.randrange(1, 6))]
    batch = collate(examples)
    for row, example in enumerate(examples):
        for position in range(batch.labels.shape[1]):
            is_next = position + 1 < len(example) and example.loss_mask[position + 1]
            wanted = example.input_ids[position + 1] if is_next else IGNORE_INDEX
            assert batch.labels[row, position] == wanted


def test_padding_is_masked_by_length_even_if_real_tokens_have_the_same_id(rng):
    examples = [make_example([0] * length, [True] * length) for length in rng.sample(range(2, 20), k=4)]
    batch = collate(examples)
    assert batch.attention_mask.sum(1).tolist() == [len(example) for example in examples]
    for row, example in enumerate(examples):
        assert batch.attention_mask[row, : len(example)].all()
        assert (batch.labels[row] == 0).sum() == len(example) - 1


def test_a_batch_holds_the_examples_tokens_and_is_as_long_as_the_longest(rng):
    examples = [random_example(rng) for _ in range(4)] + [make_example(range(40), [True] * 40)]
    batch = collate(examples)
    assert batch.input_ids.shape == (5, max(map(len, examples)))
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.attention_mask.dtype} == {torch.int64}
    for row, example in enumerate(examples):
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == example.input_ids.tolist()
        assert batch.position_ids[row, : len(example)].tolist() == list(range(len(example)))


def test_a_batch_knows_how_many_labels_count(rng):
    examples = [random_example(rng) for _ in range(rng.randrange(1, 8))]
    batch = collate(examples)
    assert batch.num_supervised == int((batch.labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("packed", [False, True])
def test_a_moved_batch_is_the_same(rng, packed):
    batch = collate([random_weighted(rng) for _ in range(3)], packed)
    moved = batch.to(torch.device("cpu"))
    for each in fields(batch):
        before, now = getattr(batch, each.name), getattr(moved, each.name)
        assert torch.equal(before, now) if isinstance(before, torch.Tensor) else before == now
    assert (moved.attention_mask is None) == packed


def random_weighted(rng):
    length = rng.randrange(2, 30)
    return make_example(rng.choices(range(9), k=length), rng.choices([0, 0.25, 1, 2], k=length - 1) + [0.5])


def test_packed_documents_follow_each_other_with_positions_of_their_own(rng):
    examples = [random_example(rng) for _ in range(rng.randrange(1, 8))]
    batch = collate(examples, packed=True)
    assert batch.attention_mask is None
    assert batch.input_ids.shape == (1, sum(map(len, examples)))
    assert batch.input_ids[0].tolist() == [token for example in examples for token in example.input_ids.tolist()]
    assert batch.position_ids[0].tolist() == [place for example in examples for place in range(len(example))]


def test_no_packed_document_is_asked_for_the_next_ones_first_token(rng):
    examples = [random_example(rng) for _ in range(rng.randrange(2, 8))]
    batch = collate(examples, packed=True)
    begin = 0
    for example in examples:
        alone, end = collate([example]), begin + len(example)
        assert batch.labels[0, begin:end].tolist() == alone.labels[0].tolist()
        assert batch.labels[0, end - 1] == IGNORE_INDEX
        begin = end
    assert batch.num_supervised == int((batch.labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("packed", [False, True])
def test_every_label_has_the_weight_of_its_token(rng, packed):
    examples = [random_weighted(rng) for _ in range(rng.randrange(2, 6))]
    batch = collate(examples, packed)
    supervised = batch.labels != IGNORE_INDEX
    expected = [weight for example in examples for weight in example.weights[1:].tolist() if weight]
    assert batch.weights.dtype == torch.float32
    assert batch.weights.tolist() == expected
    assert torch.equal(batch.supervised, supervised.flatten().nonzero().squeeze(1))
    assert batch.num_supervised == len(expected)
    assert batch.total_weight == sum(expected) == sum(example.total_weight for example in examples)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_that_are_all_alike_are_left_out(rng, packed):
    batch = collate([random_example(rng) for _ in range(3)], packed)
    assert batch.weights is None
    assert batch.total_weight == batch.num_supervised


def test_rows_of_one_length_need_no_mask(rng):
    length = rng.randrange(2, 30)
    batch = collate([make_example(range(length), [1] * length) for _ in range(3)])
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [list(range(length))] * 3


@CAPACITIES
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_example_is_seen_once_an_epoch(rng, capacity, epoch):
    plan = random_plan(rng, capacity)
    assert sorted(epoch_order(plan, epoch)) == list(range(len(plan.lengths)))


@CAPACITIES
def test_every_epoch_has_an_order_of_its_own(rng, capacity):
    plan = BatchPlan(random_lengths(rng), 2, 2, capacity, seed=rng.randrange(10**6))
    orders = [epoch_order(plan, epoch) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(len(plan.lengths))) not in orders


@CAPACITIES
def test_the_seed_decides_the_order(rng, capacity):
    lengths, seed = random_lengths(rng), rng.randrange(10**6)
    first, other, again = (BatchPlan(lengths, 2, 3, capacity, seed=each) for each in (seed, seed + 1, seed))
    order = epoch_order(first)
    assert epoch_order(other) != order
    for epoch in range(1, 4):
        epoch_order(other, epoch)  # fills what is kept of earlier orders
    assert epoch_order(again) == order


@CAPACITIES
def test_the_order_does_not_depend_on_how_a_step_is_cut(rng, capacity):
    lengths, seed = random_lengths(rng, 50), rng.randrange(10**6)
    whole, cut = (BatchPlan(lengths, *shape, capacity, seed) for shape in ((8, 1), (2, 4)))
    assert [whole.window(step) for step in range(9)] == [cut.window(step) for step in range(9)]


@CAPACITIES
def test_a_step_is_known_without_the_steps_before(rng, capacity):
    plan, seed = random_plan(rng, capacity), rng.randrange(10**6)
    windows = [plan.window(step) for step in range(3 * plan.steps_per_epoch)]
    step = seed % len(windows)
    assert replaced(plan).window(step) == windows[step]


@CAPACITIES
def test_micro_batches_are_the_window_cut(rng, capacity):
    plan = random_plan(rng, capacity)
    row_of = {index: row for row, members in enumerate(plan.rows) for index in members}
    for step in range(2 * plan.steps_per_epoch):
        batches = plan.micro_batches(step)
        assert [index for batch in batches for index in batch] == plan.window(step)
        rows = [{row_of[index] for index in batch} for batch in batches]
        assert {len(each) for each in rows[:-1]} <= {plan.micro_batch_size}
        assert 1 <= len(rows[-1]) <= plan.micro_batch_size
        assert len(batches) <= plan.gradient_accumulation_steps
        assert sum(map(len, rows)) == len(set.union(*rows))  # no row is torn apart


@CAPACITIES
def test_the_last_window_of_an_epoch_holds_what_is_left(rng, capacity):
    plan = random_plan(rng, capacity)
    row_of = {index: row for row, members in enumerate(plan.rows) for index in members}
    sizes = [len({row_of[index] for index in plan.window(step)}) for step in range(plan.steps_per_epoch)]
    assert sizes[:-1] == [plan.rows_per_step] * (len(sizes) - 1)
    assert sizes[-1] == len(plan.rows) - sum(sizes[:-1])
    assert 1 <= sizes[-1] <= plan.rows_per_step


def test_fewer_examples_than_a_step_takes_are_one_step(rng):
    plan = BatchPlan(np.array([4, 4, 4]), 4, 4, seed=rng.randrange(10**6))
    assert plan.steps_per_epoch == 1
    assert sorted(plan.window(0)) == [0, 1, 2]


@CAPACITIES
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_a_step_without_gap_or_overlap(rng, capacity, world_size):
    one = random_plan(rng, capacity, world_size=world_size)
    plans = [replaced(one, rank=rank) for rank in range(world_size)]
    for step in range(2 * one.steps_per_epoch):
        shares = [[index for batch in plan.micro_batches(step) for index in batch] for plan in plans]
        window = one.window(step)
        assert Counter(index for share in shares for index in share) == Counter(window)
        assert {tuple(plan.window(step)) for plan in plans} == {tuple(window)}
        if step % one.steps_per_epoch < one.steps_per_epoch - 1:
            assert {len(plan.micro_batches(step)) for plan in plans} == {one.gradient_accumulation_steps}


@CAPACITIES
def test_processes_see_together_what_one_sees_with_as_many_micro_batches(rng, capacity):
    shared = random_plan(rng, capacity, world_size=2)
    alone = replaced(shared, gradient_accumulation_steps=2 * shared.gradient_accumulation_steps, world_size=1)
    for step in range(2 * alone.steps_per_epoch):
        assert alone.window(step) == shared.window(step)
        both = [replaced(shared, rank=rank).micro_batches(step) for rank in (0, 1)]
        assert sorted(both[0] + both[1]) == sorted(alone.micro_batches(step))


def test_rows_of_like_length_share_a_micro_batch(rng):
    """Within a step they are cut from the longest to the shortest, which is the least padding there can be."""
    plan = random_plan(rng)
    for step in range(plan.steps_per_epoch):
        lengths = [[int(plan.lengths[index]) for index in batch] for batch in plan.micro_batches(step)]
        assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)


def test_grouping_by_length_leaves_the_steps_as_they_are_drawn(rng):
    """Another length of some example changes the order within its step alone."""
    plan = random_plan(rng)
    other = replaced(plan, lengths=np.array(rng.sample(plan.lengths.tolist(), k=len(plan.lengths))))
    for step in range(2 * plan.steps_per_epoch):
        assert sorted(plan.window(step)) == sorted(other.window(step))


def test_packed_rows_do_not_exceed_their_capacity_and_fill_is_their_share(rng):
    plan = random_plan(rng, capacity=64)
    totals = [sum(plan.lengths[index] for index in row) for row in plan.rows]
    assert max(totals) <= 64
    assert plan.fill == pytest.approx(sum(totals) / (64 * len(totals)))
    assert len(plan.rows) < len(plan.lengths)
    assert random_plan(rng).fill == 1


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_evaluation_sees_every_example_once_the_longest_first(rng, batch_size):
    examples = [random_example(rng, vocabulary=500) for _ in range(rng.randrange(1, 30))]
    batches = list(eval_batches(examples, batch_size))
    seen = []
    for batch in batches:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        seen += [tuple(ids[row.bool()].tolist()) for ids, row in zip(batch.input_ids, mask, strict=True)]
    assert sorted(seen) == sorted(tuple(example.input_ids.tolist()) for example in examples)
    assert max(len(batch.input_ids) for batch in batches) <= batch_size
    assert sum(batch.num_supervised for batch in batches) == sum(example.num_supervised for example in examples)
    assert [len(ids) for ids in seen] == sorted(map(len, seen), reverse=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_evaluation_sees_every_example_once(rng, batch_size):
    examples = [random_example(rng, vocabulary=500) for _ in range(rng.randrange(5, 40))]
    batches = list(eval_batches(examples, batch_size, capacity=40))
    seen = []
    for batch in batches:
        assert batch.input_ids.shape[0] == 1
        assert batch.input_ids.shape[1] <= 40 * batch_size
        begins = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), batch.input_ids.shape[1]]
        seen += [tuple(batch.input_ids[0, begin:end].tolist()) for begin, end in pairwise(begins)]
    assert sorted(seen) == sorted(tuple(example.input_ids.tolist()) for example in examples)
    assert sum(batch.num_supervised for batch in batches) == sum(example.num_supervised for example in examples)
