"""Learning rates and intervals at their edges."""

import math
import random

import pytest
import torch
from transformers import optimization

from qlora.config import TrainSection
from qlora.training.schedule import KINDS, learning_rate, rate_of, resolve_interval, resolve_total_steps

FALLING = [kind for kind in KINDS if kind not in ("constant", "inverse_sqrt")]


def rates(kind, total, warmup_steps, peak=1.0, **shape):
    return [learning_rate(step, total, peak, kind, warmup_steps, **shape) for step in range(total)]


def transformers_rates(name, total, warmup_steps, peak, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    arguments = {"num_training_steps": total, **arguments} if name != "get_inverse_sqrt_schedule" else arguments
    scheduler = getattr(optimization, name)(optimizer, num_warmup_steps=warmup_steps, **arguments)
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "constant"])
def test_after_the_warmup_the_rates_are_those_of_transformers(kind, seed, warmup):
    rng = random.Random(seed)
    total, peak, floor = rng.randrange(30, 90), rng.uniform(1e-5, 1e-2), rng.uniform(0, 0.9)
    warmup_steps, decay_steps, restarts = rng.randrange(1, 9) * warmup, rng.randrange(1, 20), rng.randrange(1, 4)
    name, minimum, arguments = {
        "cosine": ("get_cosine_with_min_lr_schedule_with_warmup", floor, {"min_lr_rate": floor}),
        "linear": ("get_polynomial_decay_schedule_with_warmup", floor, {"lr_end": floor * peak}),
        "wsd": ("get_wsd_schedule", floor,
                {"num_decay_steps": decay_steps, "decay_type": "1-sqrt", "min_lr_ratio": floor}),
        "inverse_sqrt": ("get_inverse_sqrt_schedule", 0, {}),
        "cosine_restarts": ("get_cosine_with_hard_restarts_schedule_with_warmup", 0, {"num_cycles": restarts + 1}),
    }[kind]  # fmt: skip
    expected = transformers_rates(name, total, warmup_steps, peak, **arguments)
    found = rates(
        kind, total, warmup_steps, peak, minimum=minimum * peak, decay_ratio=decay_steps / total, restarts=restarts
    )
    assert found[warmup_steps:] == pytest.approx(expected[warmup_steps:], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_rises_evenly_from_above_zero_to_the_peak(kind):
    found = rates(kind, 100, 10, peak=3.0)
    assert found[:11] == pytest.approx([3.0 * step / 11 for step in range(1, 12)])
    assert max(found) == 3.0


@pytest.mark.parametrize(("kind", "expected"), [
    ("linear", [1, 0.75, 0.5, 0.25]),
    ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ("constant", [1, 1, 1, 1]),
    ("wsd", [1, 1, 1, 1 - math.sqrt(0.5)]),
    ("cosine_restarts", [1, 0.5, 1, 0.5]),
])  # fmt: skip
def test_without_a_warm_up_the_first_step_has_the_peak(kind, expected):
    assert rates(kind, 4, 0, decay_ratio=0.5) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_falls_to_its_minimum_in_the_shape_it_has_without_one(kind):
    plain, found = rates(kind, 20, 2, 3.0), rates(kind, 20, 2, 3.0, minimum=1.0)
    assert found[:2] == plain[:2]  # the warm-up still begins at zero
    assert found[2:] == pytest.approx([1.0 + rate * 2 / 3 for rate in plain[2:]])


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("warmup_steps", [0, 2, 24])
def test_it_falls_to_zero_at_the_end_and_no_step_is_lost_to_zero(kind, warmup_steps):
    found = rates(kind, 50, warmup_steps)
    last_peak = len(found) - 1 - found[::-1].index(max(found))
    assert all(earlier > later for earlier, later in zip(found[last_peak:], found[last_peak + 1 :], strict=False))
    assert found[-1] > 0
    assert learning_rate(50, 50, 1.0, kind, warmup_steps) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup_steps"), [(1, 0), (1, 1), (2, 2), (3, 2), (3, 100)])
def test_a_run_of_few_steps_has_a_rate_in_each(kind, total, warmup_steps):
    assert all(0 < rate <= 1 for rate in rates(kind, total, warmup_steps))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'polynomial' should be one of cosine"):
        learning_rate(0, 1, 1.0, "polynomial", 0)


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, 3),
    ({"warmup_ratio": 0.1}, 10),
    ({"warmup_steps": 7}, 7),
    ({"warmup_steps": 0}, 0),
])  # fmt: skip
def test_the_warmup_of_a_config_is_a_share_or_a_number_of_steps(keys, expected):
    rate = rate_of(TrainSection(output_dir="o", learning_rate=0.5, lr_scheduler="constant", **keys), 100)
    assert [step for step in range(100) if rate(step) < 0.5] == list(range(expected))


@pytest.mark.parametrize(("keys", "steps_at_peak"), [
    ({"lr_scheduler": "wsd"}, 81),
    ({"lr_scheduler": "wsd", "decay_ratio": 0.5}, 51),
    ({"lr_scheduler": "cosine_restarts"}, 2),
    ({"lr_scheduler": "cosine_restarts", "restarts": 3}, 4),
])  # fmt: skip
def test_the_options_of_a_scheduler_reach_it(keys, steps_at_peak):
    rate = rate_of(TrainSection(output_dir="o", learning_rate=0.5, warmup_steps=0, **keys), 100)
    assert [rate(step) for step in range(100)].count(0.5) == steps_at_peak


@pytest.mark.parametrize(("value", "total", "expected"), [
    (None, 100, None),
    (0.25, 100, 25),
    (0.25, 10, 2),
    (0.001, 100, 1),
    (0.999, 1, 1),
    (1, 100, 1),
    (1.0, 100, 100),
    (200, 100, 200),
])  # fmt: skip
def test_an_interval_is_a_share_up_to_one_point_zero_and_else_steps(value, total, expected):
    assert resolve_interval(value, total) == expected


@pytest.mark.parametrize(("epochs", "max_steps", "steps_per_epoch", "expected"), [
    (1, None, 8, 8),
    (2, None, 8, 16),
    (0.5, None, 8, 4),
    (1.1, None, 8, 9),
    (0.01, None, 8, 1),
    (3, 5, 8, 5),
    (1, 20, 8, 20),
])  # fmt: skip
def test_steps_follow_from_epochs_unless_a_number_is_given(epochs, max_steps, steps_per_epoch, expected):
    assert resolve_total_steps(epochs, max_steps, steps_per_epoch) == expected
