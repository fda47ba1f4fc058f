"""Every key is described, and the page, the full config and the schema agree with the sections."""

import json
from pathlib import Path

import pytest
import yaml

from qlora.config import RunConfig, SourceSection, load_config
from qlora.config.hints import keys_of, nested_section
from qlora.config.pages import full_config, reference_page
from qlora.config.reference import SOURCE, find_keys, json_schema, list_keys
from qlora.errors import ConfigError
from scripts.dev.config_page import PAGE
from tests.cli import run

KEYS = list_keys()
RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Keys that have no meaning without another one.
NEEDED = {
    "train.decay_ratio": {"train": {"lr_scheduler": "wsd"}},
    "train.restarts": {"train": {"lr_scheduler": "cosine_restarts"}},
    **{
        f"train.preference{key}": {"train": {"objective": "dpo"}}
        for key in (
            "",
            ".beta",
            ".label_smoothing",
            ".sft_weight",
            ".length_normalize",
        )
    },
    "train.preference.gamma": {"train": {"objective": "simpo"}},
    **{
        f"train.preference.{key}": {"train": {"objective": "kto"}} for key in ("desirable_weight", "undesirable_weight")
    },
    "lora.train": {"lora": {"init": "orthogonal"}},
    "lora.calibrate": {"lora": {"init": "reconstruct"}},
    "lora.stack": {"lora": {"start_from": "runs/earlier"}},
    "eval.metrics": {"data": {"eval": 0.1}},
    "train.keep_best": {"data": {"eval": 0.1}},
    "train.early_stopping": {"data": {"eval": 0.1}},
    "train.best_mode": {"data": {"eval": 0.1}, "train": {"keep_best": True}},
    **{f"train.early_stopping.{key}": {"data": {"eval": 0.1}} for key in ("metric", "patience", "min_delta")},
    **dict.fromkeys(("train.samples", "train.samples.every", "train.samples.max_new_tokens"), {"data": {"eval": 0.1}}),
    "data.labels": {"train": {"objective": "classify"}},
    "model.rope_scaling.type": {"model": {"rope_scaling": {"factor": 2}}},
    "train.classify_by": {"train": {"objective": "classify"}},
    "train.class_weights": {"train": {"objective": "classify"}},
    **dict.fromkeys(("train.reward", "train.reward.center"), {"train": {"objective": "reward"}}),
}
REQUIRED = {
    "model.base",
    "data.train",
    "train.output_dir",
    "train.adversarial.epsilon",
    "model.rope_scaling.factor",
    f"{SOURCE}.path",
}


def test_every_key_is_listed_once():
    expected = [f"{section}.{key}" for section in RunConfig.model_fields for key in keys_of(section)]
    for name in list(expected):
        group = nested_section(*name.split("."))
        expected += [f"{name}.{key}" for key in (group.model_fields if group else ())]
    assert [key.name for key in KEYS] == expected + [f"{SOURCE}.{key}" for key in SourceSection.model_fields]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_key_has_a_meaning_of_one_or_more_sentences_and_an_example_that_is_valid(key):
    assert key.meaning[0].isupper()
    assert key.meaning.endswith(".")
    assert key.type
    assert (key.default is None) == (key.name in REQUIRED)
    values = {"model": {"base": "b"}, "data": {"train": "t"}, "train": {"output_dir": "o"}}
    for section, needed in NEEDED.get(key.name, {}).items():
        values.setdefault(section, {}).update(needed)
    example = yaml.safe_load(key.example)
    if key.group == SOURCE:
        values["data"]["train"] = [{"path": "t", key.key: example}]
    else:
        section, _, group = key.group.partition(".")
        in_section = values.setdefault(section, {})
        in_section[group or key.key] = {**in_section.get(group, {}), key.key: example} if group else example
    RunConfig.model_validate(values)


def test_a_range_is_that_of_the_section():
    ranges = {key.name: key.range for key in KEYS}
    assert ranges["train.learning_rate"] == "> 0, < 1"
    assert ranges["lora.rank"] == "≥ 1"
    assert ranges["data.max_seq_len"] == "≥ 8"
    assert ranges["model.base"] == ""


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "python -m scripts.dev.config_page writes it again"


def test_a_config_with_every_key_loads_with_every_key_at_its_default(tmp_path):
    path = tmp_path / "all.yaml"
    assert run("init", "--all", "-o", path).code == 0
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {section: list(keys) for section, keys in written.items()} == {
        section: keys_of(section) for section in RunConfig.model_fields
    }
    required = {
        "model": {"base": written["model"]["base"]}, "data": {"train": written["data"]["train"]},
        "train": {"output_dir": written["train"]["output_dir"]},
    }  # fmt: skip
    assert load_config(path) == RunConfig.model_validate(required)
    assert path.read_text(encoding="utf-8") == full_config()


def unknown_to(schema, value, root):
    """Return keys of a value that a schema lacks, and values that no alternative allows, by a few of its rules."""
    if "$ref" in schema:
        return unknown_to(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return min((unknown_to(part, value, root) for part in schema["anyOf"]), key=len)
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
             "null": type(None)}  # fmt: skip
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        return [value]
    if "enum" in schema and value not in schema["enum"]:
        return [value]
    if isinstance(value, list) and "items" in schema:
        return [wrong for one in value for wrong in unknown_to(schema["items"], one, root)]
    if isinstance(value, dict) and "properties" in schema:
        assert schema["additionalProperties"] is False
        known = schema["properties"]
        missing = [key for key in schema.get("required", ()) if key not in value]
        return missing + [
            wrong
            for key, part in value.items()
            for wrong in (unknown_to(known[key], part, root) if key in known else [key])
        ]
    return []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_the_recipes_and_refuses_a_misspelt_key(recipe, tmp_path):
    path = tmp_path / "qlora.schema.json"
    assert run("init", "--schema", "-o", path).code == 0
    schema = json.loads(path.read_text(encoding="utf-8"))
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert unknown_to(schema, values, schema) == []
    assert unknown_to(schema, values | {"lora": {"rnak": 8}}, schema) == ["rnak"]
    assert unknown_to(schema, values | {"data": {"train": [{"path": "a", "wieght": 2}]}}, schema) != []


@pytest.mark.parametrize("sources", ["a", {"path": "a"}, ["a", {"path": "b", "weight": 2}]], ids=str)
def test_the_schema_accepts_what_the_loader_accepts(sources):
    schema = json_schema()
    values = {"model": {"base": "b", "compute_dtype": "bf16"}, "data": {"train": sources, "eval": sources},
              "train": {"output_dir": "o", "trackers": "tensorboard"}}  # fmt: skip
    assert unknown_to(schema, values, schema) == []
    RunConfig.model_validate(values)


def test_a_validator_of_schemas_agrees():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for recipe in RECIPES:
        validator.validate(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    assert not validator.is_valid({"model": {"base": "b"}, "data": {"train": "t"}, "train": {"output_dir": 3}})


@pytest.mark.parametrize(("name", "found"), [
    ("train.learning_rate", ["train.learning_rate"]),
    ("learning_rate", ["train.learning_rate"]),
    ("dtype", ["lora.dtype", "export.dtype"]),
    ("export", ["export.dtype", "export.onto", "export.max_shard_size"]),
    ("data.eval[].weight", [f"{SOURCE}.weight"]),
])  # fmt: skip
def test_a_key_is_found_by_its_full_name_its_section_or_its_own_name(name, found):
    assert [key.name for key in find_keys(name)] == found


@pytest.mark.parametrize(("name", "close"), [
    ("train.learningrate", "train.learning_rate"), ("rnak", "lora.rank"), ("data.packng", "data.packing"),
])  # fmt: skip
def test_an_unknown_key_is_answered_with_the_closest(name, close):
    with pytest.raises(ConfigError, match=f"There is no key '{name}'.*{close}"):
        find_keys(name)


def test_explain_prints_a_key_a_section_or_all_of_them():
    one = run("explain", "lora.rank")
    assert one.code == 0
    assert [word for word in ("lora.rank", "integer", "≥ 1", "16", "rank: 64") if word not in one.out] == []
    assert run("explain", "export").out.count("default") == 3
    lines = run("explain").out.splitlines()
    assert [line.split()[0] for line in lines] == [key.name for key in KEYS]


def test_explain_knows_the_names_of_other_trainers():
    assert run("explain", "lora_r").out == run("explain", "lora.rank").out
    assert "--resume" in run("explain", "resume_from_checkpoint").error()


def test_explain_gives_json():
    (found,) = run("explain", "train.betas", "--json").json().values()
    assert (found["default"], found["example"]) == ("[0.9, 0.999]", "[0.9, 0.95]")


def test_explain_of_an_unknown_key_is_one_error():
    done = run("explain", "train.learnin_rate")
    assert done.code == 2
    assert "train.learning_rate" in done.error()
