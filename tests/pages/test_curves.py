"""Curves of a run: what is drawn, and that thinning them keeps what matters."""

import math
import random

import pytest

from qlora.pages.curves import TRAINING, curves_by_quantity, smoothed, thinned


def noisy(count):
    source = random.Random(count)
    return [(step, source.gauss(1, 0.1)) for step in range(1, count + 1)]


@pytest.mark.parametrize("limit", [4, 7, 100, 1600])
def test_thinning_keeps_the_ends_and_every_extreme(limit):
    points = noisy(20_000)
    points[7_001] = (7_002, 50.0)
    points[13_333] = (13_334, -50.0)
    few = thinned(points, limit)
    assert len(few) <= limit
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert {(7_002, 50.0), (13_334, -50.0)} <= {*few}
    assert few == sorted({*few})
    assert {*few} <= {*points}


def test_every_part_of_a_thinned_curve_has_its_own_extremes():
    points = noisy(1_002)
    few, inner = thinned(points, 22), points[1:-1]
    for part in range(10):
        bucket = inner[part * 100 : (part + 1) * 100]
        kept = [value for step, value in few[1:-1] if bucket[0][0] <= step <= bucket[-1][0]]
        values = [value for _, value in bucket]
        assert (min(kept), max(kept)) == (min(values), max(values))


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_a_short_curve_is_not_thinned(count):
    assert thinned(noisy(count), 50) == noisy(count)


def test_smoothing_begins_at_the_first_value_and_keeps_a_constant():
    assert smoothed([(1, 3.0), (2, 3.0), (9, 3.0)]) == [(1, 3.0), (2, 3.0), (9, pytest.approx(3.0))]
    assert smoothed([]) == []


def test_quantities_come_with_all_their_sets_in_the_order_of_the_charts():
    lines = [
        {"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_old_f1_loss": 2.0, "retain_f1": 0.5, "eval_perplexity": 20.0},
        {"step": 1, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-4, "grad_norm": None, "tokens": 9, "reward": 0.1},
        {"step": 1, "loss_spike": "the loss jumped", "rows": {"a": [1]}},
        {"step": 2, "epoch": 1.0, "loss": 2.0, "learning_rate": 2e-4, "grad_norm": math.nan, "tokens": 18, "reward": 0},
    ]
    found = curves_by_quantity(lines, ["eval", "eval_old_f1", "retain"])
    assert list(found) == ["loss", "reward", "f1", "learning_rate"]
    assert [(curve.source, curve.is_smoothed) for curve in found["loss"]] == [
        (TRAINING, False), ("eval", False), ("eval_old_f1", False),
    ]  # fmt: skip
    assert found["loss"][2].points == [(0, 2.0)]
    assert found["learning_rate"][0].points == [(1, 1e-4), (2, 2e-4)]


def test_training_is_smoothed_where_it_varies_by_chance():
    lines = [{"step": step, "loss": value, "learning_rate": 1e-4} for step, value in noisy(100)]
    found = curves_by_quantity(lines, [])
    assert [curve.is_smoothed for curve in found["loss"]] == [False, True]
    assert found["loss"][1].points == smoothed(found["loss"][0].points)
    assert [curve.is_smoothed for curve in found["learning_rate"]] == [False]
