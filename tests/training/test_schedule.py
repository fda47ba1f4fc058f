"""Learning rates and intervals at their edges."""

import math

import pytest

from qlora.training.schedule import learning_rate, resolve_interval, resolve_total_steps


def rates(kind, total, warmup_ratio, peak=1.0):
    return [learning_rate(step, total, peak, kind, warmup_ratio) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_evenly_from_above_zero_to_the_peak(kind):
    found = rates(kind, 100, 0.1, peak=3.0)
    assert found[:11] == pytest.approx([3.0 * step / 11 for step in range(1, 12)])
    assert max(found) == 3.0


@pytest.mark.parametrize(("kind", "expected"), [
    ("linear", [1, 0.75, 0.5, 0.25]),
    ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ("constant", [1, 1, 1, 1]),
])  # fmt: skip
def test_without_a_warm_up_the_first_step_has_the_peak(kind, expected):
    assert rates(kind, 4, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_schedule_falls_to_its_minimum_in_the_shape_it_has_without_one(kind):
    plain = [learning_rate(step, 20, 3.0, kind, 0.1) for step in range(20)]
    found = [learning_rate(step, 20, 3.0, kind, 0.1, minimum=1.0) for step in range(20)]
    assert found[:2] == plain[:2]  # the warm-up still begins at zero
    assert found[2:] == pytest.approx([1.0 + rate * 2 / 3 for rate in plain[2:]])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5])
def test_it_falls_to_zero_at_the_end_and_no_step_is_lost_to_zero(kind, warmup_ratio):
    found = rates(kind, 50, warmup_ratio)
    peak = found.index(max(found))
    assert all(earlier > later for earlier, later in zip(found[peak:], found[peak + 1 :], strict=False))
    assert found[-1] > 0
    assert learning_rate(50, 50, 1.0, kind, warmup_ratio) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup_ratio"), [(1, 0.0), (1, 0.03), (1, 0.99), (2, 0.99), (3, 0.5)])
def test_a_run_of_few_steps_has_a_rate_in_each(kind, total, warmup_ratio):
    assert all(0 < rate <= 1 for rate in rates(kind, total, warmup_ratio))


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
