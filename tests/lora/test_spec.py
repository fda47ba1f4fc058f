"""An adapter's spec: its numbers, and every wrong value at once."""

import math

import pytest
import torch

from qlora.errors import ModelError
from qlora.lora import AdapterSpec


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_and_shapes(rslora, generator):
    rank, alpha = int(torch.randint(1, 200, (), generator=generator)), 24.0
    spec = AdapterSpec(rank, alpha, rslora=rslora)
    assert spec.scaling == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank))
    assert spec.shapes(7, 5) == ((rank, 5), (7, rank))


@pytest.mark.parametrize(("name", "dtype"), [
    ("bf16", torch.bfloat16), ("float32", torch.float32), ("fp16", torch.float16), (torch.float32, torch.float32),
])  # fmt: skip
def test_a_dtype_may_be_given_by_its_name(name, dtype):
    assert AdapterSpec(dtype=name).dtype == dtype


@pytest.mark.parametrize(("values", "told"), [
    ({"rank": 0}, "rank: 0 should be a whole number from 1"),
    ({"rank": 1.5}, "rank: 1.5 should be"),
    ({"rank": True}, "rank: True should be"),
    ({"alpha": 0}, "alpha: 0 should be a number above 0"),
    ({"alpha": float("nan")}, "alpha: nan should be"),
    ({"dropout": 1.0}, "dropout: 1.0 should be from 0 and below 1"),
    ({"init": "pissa"}, "init: 'pissa' should be one of kaiming, gaussian"),
    ({"form": "fuse"}, "form: 'fuse' should be one of auto, separate, folded"),
    ({"form": "folded", "dropout": 0.1}, "form: 'folded' can't drop inputs"),
    ({"dtype": "bf17"}, "dtype: 'bf17' should be one of bfloat16"),
    ({"dtype": torch.int8}, "dtype: torch.int8 should be one of bfloat16"),
])  # fmt: skip
def test_a_value_that_can_not_be_is_refused(values, told):
    with pytest.raises(ModelError, match=told.replace("(", r"\\(")):
        AdapterSpec(**values)


def test_all_wrong_values_are_reported_at_once():
    with pytest.raises(ModelError, match="(?s)rank: -1.*alpha: -2.*init: 'x'.*form: 'y'"):
        AdapterSpec(-1, -2, init="x", form="y")
