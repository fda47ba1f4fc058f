"""A context extended in config.json, in every layout of its keys."""

import pytest
from pydantic import ValidationError

from qlora.config.sections.model import RopeScalingSection
from qlora.errors import ModelError
from qlora.files.rope import extend_context, num_positions

YARN = {"type": "yarn", "factor": 4.0}
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": SCALED}),
        ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e4, "rope_scaling": SCALED}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            {"rope_parameters": SCALED | {"rope_theta": 1e4}},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_theta": 1}}},
            {"rope_parameters": {"full_attention": SCALED, "sliding_attention": {"rope_theta": 1}}},
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            {"rope_scaling": SCALED | {"mrope_section": [2, 3, 3]}},
        ),
    ],
    ids=["old", "old, null", "new", "by layer", "mrope"],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_the_scaling_is_written_where_the_config_has_it(is_nested, config, expected):
    config, expected = ({"max_position_embeddings": n} | each for n, each in ((100, config), (400, expected)))
    if is_nested:
        config, expected = {"text_config": config}, {"text_config": expected}
    extended = extend_context(config, YARN, "base")
    assert extended == expected
    assert (num_positions(config), num_positions(extended)) == (100, 400)


def test_dynamic_scaling_keeps_the_length_from_which_it_scales():
    extended = extend_context({"max_position_embeddings": 100}, {"type": "dynamic", "factor": 2}, "base")
    assert extended == {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert num_positions(extended) == 200


@pytest.mark.parametrize(
    ("config", "scaling", "message"),
    [
        ({"n_positions": 100}, YARN, "needs max_position_embeddings in config.json, which has none"),
        ({"max_position_embeddings": 9, "rope_scaling": {"type": "linear"}}, YARN, "of the type linear .* already"),
        ({"max_position_embeddings": 9}, {"type": "longer", "factor": 2}, "should be a type .* and a factor above 1"),
        ({"max_position_embeddings": 9, "rope_scaling": [1]}, YARN, r"has rope_scaling: \[1\] in its config.json"),
        ({"max_position_embeddings": 9}, {"type": "yarn", "factor": float("inf")}, "and a factor above 1"),
        ({"max_position_embeddings": 9}, {"type": "yarn", "factor": 1}, "should be a type .* and a factor above 1"),
    ],
)
def test_what_cannot_be_extended_is_refused(config, scaling, message):
    with pytest.raises(ModelError, match=message):
        extend_context(config, scaling, "base")


@pytest.mark.parametrize("factor", ["inf", "nan"])
def test_a_config_refuses_factors_that_are_not_numbers(factor):
    with pytest.raises(ValidationError, match="finite number"):
        RopeScalingSection(factor=float(factor))


def test_the_sections_of_qwen2_vl_are_kept_in_the_model():
    from transformers import Qwen2VLTextConfig

    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config = {"max_position_embeddings": 100, "hidden_size": 64, "num_attention_heads": 4, "rope_scaling": rope}
    found = Qwen2VLTextConfig.from_dict(extend_context(config, YARN, "base")).rope_parameters
    assert found["rope_type"] == "yarn"
    assert found["mrope_section"] == [2, 3, 3]
