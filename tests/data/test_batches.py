"""Labels, padding, and an order in which nothing is lost or seen twice."""

import random
from collections import Counter

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


def random_plan(rng, **fixed):
    """A plan with a last window that is not full."""
    size, accumulation = rng.randrange(1, 5), rng.randrange(1, 5)
    per_step = size * accumulation * fixed.get("world_size", 1)
    num_examples = per_step * rng.randrange(2, 6) + rng.randrange(1, per_step + 1)
    return BatchPlan(num_examples, size, accumulation, **{"seed": rng.randrange(10**6), **fixed})


def epoch_order(plan, epoch=0):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [index for step in steps for index in plan.window(step)]


def test_labels_are_the_supervised_next_tokens(rng):
    examples = [random_example(rng) for _ in range(rng.randrange(1, 6))]
    batch = collate(examples)
    for row, example in enumerate(examples):
        for position in range(batch.labels.shape[1]):
            is_next = position + 1 < len(example) and example.loss_mask[position + 1]
            wanted = example.input_ids[position + 1] if is_next else IGNORE_INDEX
            assert batch.labels[row, position] == wanted


def test_padding_is_told_by_length_even_where_real_tokens_look_like_it(rng):
    examples = [make_example([0] * length, [True] * length) for length in rng.sample(range(2, 20), k=4)]
    batch = collate(examples)
    assert batch.attention_mask.sum(1).tolist() == [len(example) for example in examples]
    for row, example in enumerate(examples):
        assert batch.attention_mask[row, : len(example)].all()
        assert (batch.labels[row] == 0).sum() == len(example) - 1


def test_a_batch_holds_the_examples_tokens_and_is_as_long_as_the_longest(rng):
    examples = [random_example(rng) for _ in range(5)]
    batch = collate(examples)
    assert batch.input_ids.shape == (5, max(map(len, examples)))
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.attention_mask.dtype} == {torch.int64}
    for row, example in enumerate(examples):
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == example.input_ids.tolist()


def test_a_batch_knows_how_many_labels_count(rng):
    examples = [random_example(rng) for _ in range(rng.randrange(1, 8))]
    batch = collate(examples)
    assert batch.num_supervised == int((batch.labels != IGNORE_INDEX).sum())


def test_a_moved_batch_is_the_same(rng):
    batch = collate([random_example(rng) for _ in range(3)])
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.labels, batch.labels)
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert torch.equal(moved.attention_mask, batch.attention_mask)
    assert moved.num_supervised == batch.num_supervised


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_example_is_seen_once_an_epoch(rng, epoch):
    plan = random_plan(rng)
    assert sorted(epoch_order(plan, epoch)) == list(range(plan.num_examples))


def test_every_epoch_has_an_order_of_its_own(rng):
    plan = BatchPlan(rng.randrange(30, 60), 2, 2, seed=rng.randrange(10**6))
    orders = [epoch_order(plan, epoch) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(plan.num_examples)) not in orders


def test_the_seed_decides_the_order(rng):
    num_examples, seed = rng.randrange(30, 60), rng.randrange(10**6)
    first, other, again = (BatchPlan(num_examples, 2, 3, seed=each) for each in (seed, seed + 1, seed))
    order = epoch_order(first)
    assert epoch_order(other) != order
    for epoch in range(1, 4):
        epoch_order(other, epoch)  # fills what is kept of earlier orders
    assert epoch_order(again) == order


def test_the_order_does_not_depend_on_how_a_step_is_cut(rng):
    seed = rng.randrange(10**6)
    whole, cut = BatchPlan(50, 8, 1, seed), BatchPlan(50, 2, 4, seed)
    assert [whole.window(step) for step in range(9)] == [cut.window(step) for step in range(9)]


def test_a_step_is_known_without_the_steps_before(rng):
    plan, seed = random_plan(rng), rng.randrange(10**6)
    windows = [plan.window(step) for step in range(3 * plan.steps_per_epoch)]
    step = seed % len(windows)
    fresh = BatchPlan(plan.num_examples, plan.micro_batch_size, plan.gradient_accumulation_steps, plan.seed)
    assert fresh.window(step) == windows[step]


def test_micro_batches_are_the_window_cut(rng):
    plan = random_plan(rng)
    for step in range(2 * plan.steps_per_epoch):
        batches = plan.micro_batches(step)
        assert [index for batch in batches for index in batch] == plan.window(step)
        assert {len(batch) for batch in batches[:-1]} <= {plan.micro_batch_size}
        assert 1 <= len(batches[-1]) <= plan.micro_batch_size
        assert len(batches) <= plan.gradient_accumulation_steps


def test_the_last_window_of_an_epoch_holds_what_is_left(rng):
    plan = random_plan(rng)
    sizes = [len(plan.window(step)) for step in range(plan.steps_per_epoch)]
    assert sizes[:-1] == [plan.examples_per_step] * (len(sizes) - 1)
    assert sizes[-1] == plan.num_examples - sum(sizes[:-1])
    assert 1 <= sizes[-1] <= plan.examples_per_step


def test_fewer_examples_than_a_step_takes_are_one_step(rng):
    plan = BatchPlan(3, 4, 4, seed=rng.randrange(10**6))
    assert plan.steps_per_epoch == 1
    assert sorted(plan.window(0)) == [0, 1, 2]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_a_step_without_gap_or_overlap(rng, world_size):
    settings = random_plan(rng, world_size=world_size)
    shape = (settings.num_examples, settings.micro_batch_size, settings.gradient_accumulation_steps, settings.seed)
    plans = [BatchPlan(*shape, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(2 * settings.steps_per_epoch):
        shares = [[index for batch in plan.micro_batches(step) for index in batch] for plan in plans]
        window = settings.window(step)
        assert Counter(index for share in shares for index in share) == Counter(window)
        assert {tuple(plan.window(step)) for plan in plans} == {tuple(window)}
        if len(window) == settings.examples_per_step:
            assert {len(plan.micro_batches(step)) for plan in plans} == {settings.gradient_accumulation_steps}


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_evaluation_sees_every_example_once_the_longest_first(rng, batch_size):
    examples = [random_example(rng, vocabulary=500) for _ in range(rng.randrange(1, 30))]
    batches = list(eval_batches(examples, batch_size))
    seen = [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert sorted(seen) == sorted(tuple(example.input_ids.tolist()) for example in examples)
    assert max(len(batch.input_ids) for batch in batches) <= batch_size
    assert sum(batch.num_supervised for batch in batches) == sum(example.num_supervised for example in examples)
    assert [len(ids) for ids in seen] == sorted(map(len, seen), reverse=True)
