"""An adapter's spec: its numbers, and all wrong values in one error."""

import math

import pytest
import torch

from qlora.errors import ModelError
from qlora.lora import AdapterSpec
from qlora.lora.spec import by_pattern

NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_and_shapes(rslora, generator):
    rank, alpha = int(torch.randint(1, 200, (), generator=generator)), 24.0
    spec = AdapterSpec(rank, alpha, rslora=rslora)
    assert spec.scaling == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank))
    assert spec.shapes(7, 5) == {"lora_A": (rank, 5), "lora_B": (7, rank)}


@pytest.mark.parametrize(("name", "dtype"), [
    ("bf16", torch.bfloat16), ("float32", torch.float32), (torch.float32, torch.float32),
])  # fmt: skip
def test_a_dtype_may_be_given_by_its_name(name, dtype):
    assert AdapterSpec(dtype=name).dtype == dtype


@pytest.mark.parametrize(("values", "message"), [
    ({"rank": 0}, "rank: 0 should be a whole number from 1"),
    ({"rank": 1.5}, "rank: 1.5 should be"),
    ({"rank": True}, "rank: True should be"),
    ({"alpha": 0}, "alpha: 0 should be a number above 0"),
    ({"alpha": float("nan")}, "alpha: nan should be"),
    ({"dropout": 1.0}, "dropout: 1.0 should be from 0 and below 1"),
    ({"init": "loftq"}, "init: 'loftq' should be one of kaiming, gaussian"),
    ({"form": "fuse"}, "form: 'fuse' should be one of auto, separate, folded"),
    ({"form": "folded", "dropout": 0.1}, "form: 'folded' can't drop inputs"),
    ({"alpha": -3}, "alpha: -3 should be a number above 0"),
    ({"alpha": 10**400}, "alpha: 1000.* should be a number above 0"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: {'q_proj': 0} should map regular expressions to whole numbers"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: .* should map"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern: .* should map"),
    ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern: .* should map"),  # PEFT can't read it either
    ({"rank_pattern": ["q_proj"]}, "rank_pattern: .* should map"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: {'q_proj': -1} should map regular expressions to numbers"),
    ({"alpha_pattern": {3: 1.0}}, "alpha_pattern: .* should map"),
    ({"dtype": "bf17"}, "dtype: 'bf17' should be one of bfloat16"),
    ({"dtype": torch.int8}, "dtype: torch.int8 should be one of bfloat16"),
])  # fmt: skip
def test_an_impossible_value_is_refused(values, message):
    with pytest.raises(ModelError, match=message):
        AdapterSpec(**values)


def test_all_wrong_values_are_reported_at_once():
    with pytest.raises(ModelError, match="(?s)rank: -1.*alpha: -2.*init: 'x'.*form: 'y'"):
        AdapterSpec(-1, -2, init="x", form="y")


def test_each_layer_has_the_values_of_the_first_pattern_that_matches_its_names_end():
    spec = AdapterSpec(
        8, 16, rslora=True, dropout=0.1, rank_pattern={r"layers\.1\..*": 2, "up_proj": 4, "mlp.up_proj": 6},
        alpha_pattern={"proj": 1, r"0\.(self_attn|mlp)\..*": 5.0, "^layers.*": 7},
    )  # fmt: skip
    specs = AdapterSpec(8, 16, rank_pattern=spec.rank_pattern).by_layer(NAMES)
    assert {name: own.rank for name, own in specs.items()} == dict(zip(NAMES, [8, 4, 2, 2, 8, 4], strict=True))
    specs = AdapterSpec(8, 16, rslora=True, dropout=0.1, alpha_pattern={r"0\.(self_attn|mlp)\..*": 5.0}).by_layer(NAMES)
    assert [own.alpha for own in specs.values()] == [5.0, 5.0, 16, 16, 16, 16]
    own = specs[NAMES[0]]
    assert own.scaling == pytest.approx(5 / math.sqrt(8))
    assert (own.rslora, own.dropout, own.rank_pattern, own.alpha_pattern) == (True, 0.1, {}, {})
    with pytest.raises(ModelError) as caught:
        spec.by_layer(NAMES)
    assert str(caught.value).splitlines() == [
        f"lora.alpha_pattern: '{pattern}' matches no adapted layer, so it would change nothing; correct or remove it."
        for pattern in ("proj", "^layers.*")  # a part of a name's last part, and not the end of a name
    ]


def test_patterns_match_what_they_match_in_peft():
    other = pytest.importorskip("peft.utils.other")
    patterns = ["proj", "q_proj", "mlp", "mlp.up_proj", r"layers\.1", r"layers\.1\..*", "^model.layers.0.mlp.up_proj"]
    patterns += ["^layers.*", "model.*", r".*\.(q|up)_proj", "1.self_attn.q_proj", "layers.1.*q_proj", "a|q_proj", ""]
    for name in NAMES:
        for start in range(len(patterns)):
            values = dict(zip(patterns[start:], range(len(patterns)), strict=False))
            theirs = values.get(other.get_pattern_key(values, name), "none")
            assert by_pattern(values, name, "none") == theirs, name
