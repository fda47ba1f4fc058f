"""YAML and overrides into a config; every problem is reported with the key that was meant."""

import random
import string

import pytest
import yaml

from qlora.config import RunConfig, absolute_paths, dump_config, load_config
from qlora.config.plain_yaml import parse_yaml
from qlora.config.sections import parse_size
from qlora.errors import ConfigError

MINIMAL = {"model": {"base": "some/base"}, "data": {"train": "rows.jsonl"}, "train": {"output_dir": "runs/x"}}
SECTIONS = {section: list(field.annotation.model_fields) for section, field in RunConfig.model_fields.items()}

# Names of other trainers, and our key for each.
PEERS = {
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "sequence_len": "data.max_seq_len",
    "cutoff_len": "data.max_seq_len",
    "max_length": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "micro_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optimizer": "train.optimizer",
    "optim": "train.optimizer",
    "lr_scheduler": "train.lr_scheduler",
    "lr_scheduler_type": "train.lr_scheduler",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_target_linear": "lora.targets",
    "lora_target": "lora.targets",
    "train_on_inputs": "data.loss_on",
    "train_on_prompt": "data.loss_on",
    "val_set_size": "data.eval",
    "val_size": "data.eval",
    "max_samples": "data.max_rows",
    "max_train_samples": "data.max_rows",
    "dataset_exact_deduplication": "data.deduplicate",
    "excess_length_strategy": "data.overlong",
    "resume_from_checkpoint": "--resume auto|PATH",
    "sample_packing": "data.packing",
    "packing": "data.packing",
    "neat_packing": "data.packing",
    "roles_to_train": "data.loss_on",
    "mask_history": "data.loss_on",
    "dataset_prepared_path": "data.cache_dir",
}

INF, NAN = float("inf"), float("nan")
OUT_OF_RANGE = {
    "train.label_smoothing": (-0.1, 1, 1.5, "soft"),
    "train.neftune_alpha": (0, -1, "loud"),
    "lora.rank": [0, -4, 1.5, "many"],
    "lora.alpha": [0, -1, INF, NAN],
    "lora.rank_pattern": [{"q_proj": 0}, {"q_proj": 1.5}, {"(": 4}, {"(?i)q_proj": 4}, {"a)(b": "x"}, ["q_proj"], 3],
    "lora.final_rank": [0, -4, 2.5],
    "lora.expert_rank": [-1, 2.5, "many"],
    "lora.alpha_pattern": [{"q_proj": 0}, {"q_proj": INF}, {"[": 4}, "q_proj"],
    "lora.dropout": [-0.1, 1, 1.5],
    "lora.targets": [[], "", [3], 3, "all", ["all_linear"]],
    "data.max_rows": [0, -1, 1.5, True, "many"],
    "data.eval": [1, 1.0, -0.1, True, NAN, "1.5", [3]],
    "data.max_seq_len": [7, 0, -1],
    "train.epochs": [0, -1, INF],
    "train.max_steps": [0, -1, 2.5],
    "train.micro_batch_size": [0, -1],
    "train.gradient_accumulation_steps": [0, -1],
    "train.learning_rate": [0, -1e-4, 1, 200, INF, NAN, "automatic"],
    "train.min_learning_rate": [-1e-4, 1, 200, INF, NAN],
    "train.learning_rates": [3, [1e-3], {"lora_B": 0}, {"lora_B": INF}, {"lora_B": NAN}, {"lora_B": True}],
    "train.decay_ratio": [0, 1, -0.1],
    "train.restarts": [0, 1.5],
    "train.warmup_steps": [-1, 0.5, True],
    "train.warmup_ratio": [-0.01, 1, 3],
    "train.betas": [[1, 0.9], [0.9, 1], [-0.1, 0.9], [0.9], 0.9],
    "train.max_grad_norm": [0, -1],
    "train.weight_decay": [-0.1, INF],
    "train.seed": [-1, 0.5, 1 << 63],
    "train.log_every": [0, -1],
    "train.eval_every": [0, -1, 1.5, INF, NAN],
    "train.save_every": [0, -1, 2.5, INF, NAN],
    "train.keep_checkpoints": [0, -1],
    "eval.rows": [0, -1, 1.5],
    "eval.max_new_tokens": [0, -1],
    "export.max_shard_size": ["big", "0GB", "-5GB", "5 apples", 5],
}


@pytest.fixture
def write(tmp_path):
    """Write a config with the required keys and the given ones, and return its path."""

    def write(values=None, **dotted):
        config = {section: dict(keys) for section, keys in MINIMAL.items()}
        for key, value in {**(values or {}), **dotted}.items():
            section, dot, name = key.partition(".")
            if dot:
                config.setdefault(section, {})[name] = value
            else:
                config[key] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def bounds(schema):
    """Return every JSON schema of a key's values: its own and those of its alternatives."""
    return [schema, *(part for member in schema.get("anyOf", ()) for part in bounds(member))]


def schemas():
    whole = RunConfig.model_json_schema()
    for section, keys in SECTIONS.items():
        properties = whole["$defs"][RunConfig.model_fields[section].annotation.__name__]["properties"]
        for key in keys:
            yield f"{section}.{key}", bounds(properties[key])


CHOICES = [key for key, parts in schemas() if any("enum" in part or "const" in part for part in parts)]
NUMBERS = [
    key
    for key, parts in schemas()
    if any({"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"} & part.keys() for part in parts)
]


def test_the_command_line_beats_the_file_and_the_file_beats_the_defaults(write, seed):
    rng = random.Random(seed)
    in_file, on_line = rng.randrange(17, 500), rng.randrange(501, 999)
    path = write({"lora.rank": in_file, "lora.alpha": in_file})
    config = load_config(path, [f"lora.rank={on_line}"])
    assert (config.lora.rank, config.lora.alpha) == (on_line, in_file)
    assert load_config(path).lora.rank == in_file
    assert load_config(write()).lora.rank not in (in_file, on_line)


def test_the_last_override_of_a_key_wins(write):
    assert load_config(write(), ["train.seed=3", "train.seed=4"]).train.seed == 4


def test_an_override_starts_a_section_that_the_file_lacks(write):
    assert load_config(write(), ["export.dtype=bfloat16"]).export.dtype == "bfloat16"


def test_an_override_can_give_what_the_file_lacks(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {base: b}\ndata: {train: t}\n")
    assert load_config(path, ["train.output_dir=runs/y"]).train.output_dir == "runs/y"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_steps=null", "max_steps", None),
        ("train.learning_rate=2e-4", "learning_rate", 2e-4),
        ("train.betas=[0.8, 0.95]", "betas", (0.8, 0.95)),
        ("train.trackers=[tensorboard]", "trackers", ["tensorboard"]),
        ("train.output_dir=a=b", "output_dir", "a=b"),
        (" train.seed =7", "seed", 7),
    ],
)
def test_an_overrides_value_is_yaml(write, override, key, value):
    assert getattr(load_config(write(), [override]).train, key) == value


@pytest.mark.parametrize("override", ["max_steps=3", "train.max_steps", "train", "=3", ""])
def test_a_malformed_override_is_shown_the_form(write, override):
    message = problems(write(), [override])
    assert f"'{override}'" in message
    assert "section.key=value" in message


@pytest.mark.parametrize(("override", "meant"), [
    ("lr=1e-3", "train.learning_rate=1e-3"),
    ("learning_rate=1e-3", "train.learning_rate=1e-3"),
    ("max_steps=3", "train.max_steps=3"),
    ("lora_r=8", "lora.rank=8"),
    ("max_step=3", "train.max_steps=3"),
    ("banana=3", "train.max_steps=100"),
])  # fmt: skip
def test_an_override_without_a_section_is_shown_in_full(write, override, meant):
    assert problems(write(), [override]).endswith(f"should read section.key=value, as {meant}.")


@pytest.mark.parametrize("name", ["model_type", "strict", "tf32", "database"])
def test_a_key_that_is_no_misspelt_section_is_not_taken_for_one(write, name):
    assert "Did you mean" not in problems(write({name: 1}))


@pytest.mark.parametrize(("name", "reason"), [
    ("load_in_8bit", "8-bit bases are not available"), ("wandb_project", "environment"), ("deepspeed", "processes"),
    ("min_sample_len", "short rows"), ("compile", "torch.compile can't follow"),
])  # fmt: skip
def test_another_trainers_key_without_a_counterpart_is_answered_with_the_reason(write, name, reason):
    message = problems(write({name: 1}))
    assert f"  {name}: unknown key. It has no counterpart: " in message
    assert reason in message


@pytest.mark.parametrize("trackers", ["tensorboard", ["tensorboard"]], ids=str)
def test_a_single_tracker_needs_no_list(write, trackers):
    assert load_config(write({"train.trackers": trackers})).train.trackers == ["tensorboard"]


def test_an_override_with_a_broken_value_is_named(write):
    message = problems(write(), ["train.betas=[0.9"])
    assert "train.betas=[0.9" in message
    assert "YAML" in message


def test_an_overrides_unknown_key_is_reported_like_one_of_the_file(write):
    assert "train.max_step: unknown key. Did you mean train.max_steps?" in problems(write(), ["train.max_step=3"])


@pytest.mark.parametrize("rate", ["2e-4", "2.0e-4", "0.0002", "2E-4"])
def test_a_number_needs_no_dot(tmp_path, rate):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{base: b}}\ndata: {{train: t, eval: {rate}}}\ntrain: {{output_dir: o, learning_rate: {rate}}}\n"
    )
    config = load_config(path)
    assert config.train.learning_rate == 2e-4
    assert config.data.eval == 2e-4


@pytest.mark.parametrize("key", ["train", "eval"])
@pytest.mark.parametrize(("written", "paths"), [
    ("rows.jsonl", ["rows.jsonl"]),
    ("owner/name:split", ["owner/name:split"]),
    (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ({"path": "a.jsonl", "weight": 2}, ["a.jsonl"]),
    (["a.jsonl", {"path": "b.csv", "weight": 0.5, "format": "text"}], ["a.jsonl", "b.csv"]),
], ids=str)  # fmt: skip
def test_sources_are_a_path_a_source_or_a_list_of_them(write, key, written, paths):
    sources = getattr(load_config(write({f"data.{key}": written})).data, key)
    assert [source.path for source in sources] == paths
    expected = [one for one in (written if isinstance(written, list) else [written]) if isinstance(one, dict)]
    kept = [source.model_dump(include=set(one)) for one in expected for source in sources if source.path == one["path"]]
    assert kept == expected


def test_what_a_source_does_not_say_is_left_open(write):
    source = load_config(write({"data.train": "rows.jsonl", "data.format": "text"})).data.train[0]
    assert (source.weight, source.format, source.columns, source.roles) == (1, None, None, None)


def test_columns_may_be_given_by_number(write):
    config = load_config(write({"data.columns": {"text": 0}, "data.train": {"path": "a", "columns": {"text": "1"}}}))
    assert (config.data.columns, config.data.train[0].columns) == ({"text": "0"}, {"text": "1"})


@pytest.mark.parametrize("key", ["train", "eval"])
@pytest.mark.parametrize(("sources", "expected"), [
    ({"path": "a", "wieght": 2}, "[0].wieght: unknown key. Did you mean weight?"),
    (["a", {"path": "b", "max_seq_len": 2}], "[1].max_seq_len: unknown key. Did you mean data.max_seq_len?"),
    (["a", {"weight": 2}], "[1].path: missing; it has no default."),
    ({"path": "a", "weight": 0}, "[0].weight: 0 should be greater than 0"),
    ({"path": "a", "weight": 101}, "[0].weight: 101 should be less than or equal to 100"),
    ({"path": ""}, "[0].path: '' "),
    ({"path": "a", "type": "pdf"}, "[0].type: 'pdf' should be 'auto', 'json', "),
    ({"path": "a", "header": "no"}, "[0].header: 'no' should be 'auto', True or False"),
    ({"path": "a", "max_rows": 0}, "[0].max_rows: 0 should be greater than or equal to 1"),
    ({"path": "a", "columns": {"text": 1.5}}, "[0].columns.text: 1.5 should be a valid string"),
    ({"path": "a", "max_samples": 9}, "[0].max_samples: unknown key. In qlora, it is data.max_rows."),
    ({"path": "a", "format": "x"}, "[0].format: 'x' should be 'auto', 'alpaca', "),
    ([], ": [] should be a path, a source (path, weight, format, …) or a list of them"),
    (["a", 3], ": ['a', 3] should be a path, "),
], ids=str)  # fmt: skip
def test_a_problem_of_a_source_is_reported_once_with_its_position(write, key, sources, expected):
    message = problems(write({f"data.{key}": sources}))
    assert f"  data.{key}{expected}" in message
    assert "has a problem:" in message


def test_folding_with_dropout_is_refused_with_both_ways_out(write):
    with pytest.raises(ConfigError, match=r"dropout 0\.1 .*lora\.form: auto or lora\.dropout: 0"):
        load_config(write(), ["lora.form=folded", "lora.dropout=0.1"])
    assert load_config(write(), ["lora.form=auto", "lora.dropout=0.1"]).lora.form == "auto"


@pytest.mark.parametrize("tokens", [["<a>", "<b>", "<a>"], ["<a>", " "], [""]])
def test_new_tokens_are_named_once_and_none_is_empty(write, tokens):
    expected = problems(write({"data.new_tokens": tokens}))
    assert "data.new_tokens: " in expected
    assert "should name each token once" in expected
    assert load_config(write({"data.new_tokens": ["<a>", "a b"]})).data.new_tokens == ["<a>", "a b"]


def test_all_problems_are_reported_in_one_error(write):
    path = write({"lora.rank": 0, "lora.alfa": 1, "train.optim": "x", "data.overlong": "cut", "modle": {}})
    path.write_text(path.read_text().replace("output_dir: runs/x", ""))
    message = problems(path)
    expected = ["lora.rank", "lora.alfa", "train.optim", "data.overlong", "modle", "train.output_dir"]
    assert [key for key in expected if f"  {key}: " not in message] == []
    assert message.startswith(f"{path} has 6 problems:\n")
    assert len(message.splitlines()) == 7


@pytest.mark.parametrize("key", ["model.base", "data.train", "train.output_dir"])
def test_a_missing_key_without_a_default_is_named(write, key):
    section, _, name = key.partition(".")
    path = write()
    values = yaml.safe_load(path.read_text())
    del values[section][name]
    path.write_text(yaml.safe_dump(values))
    assert f"  {key}: missing" in problems(path)


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_missing_section_is_named(write, section):
    path = write()
    values = yaml.safe_load(path.read_text())
    del values[section]
    path.write_text(yaml.safe_dump(values))
    assert f"  {section}: missing" in problems(path)


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys])
def test_a_misspelt_key_is_answered_with_the_right_one(write, seed, key):
    rng = random.Random(seed)
    section, _, name = key.partition(".")
    position = rng.randrange(1, len(name))
    wrong = name[:position] + rng.choice(string.ascii_lowercase.replace(name[position], "")) + name[position:]
    message = problems(write({f"{section}.{wrong}": 1}))
    assert f"  {section}.{wrong}: unknown key." in message
    # Another key can be just as near to a short one.
    assert f"Did you mean {key}?" in message or len(name) < 6
    assert "Did you mean" in message


@pytest.mark.parametrize("section", list(SECTIONS))
def test_a_misspelt_section_is_answered_with_the_right_one(write, section):
    assert f"  {section}s: unknown key. Did you mean {section}?" in problems(write({f"{section}s": {}}))


def test_a_key_unlike_any_other_is_only_reported_as_unknown(write):
    message = problems(write({"train.qqqqqqqq": 1}))
    assert "  train.qqqqqqqq: unknown key." in message
    assert "Did you mean" not in message


@pytest.mark.parametrize("name", PEERS)
def test_a_top_level_name_of_another_trainer_is_answered_with_ours(write, name):
    message = problems(write({name: 1}))
    assert f"  {name}: unknown key." in message
    assert PEERS[name] in message


@pytest.mark.parametrize("name", PEERS)
def test_another_trainers_name_inside_a_section_is_answered_with_ours(write, name):
    for section in (section for section in SECTIONS if name not in SECTIONS[section]):
        assert PEERS[name] in problems(write({f"{section}.{name}": 1}))


def test_a_key_in_the_wrong_section_is_answered_with_the_right_one(write):
    wrong = [
        (key, f"{section}.{key}", other)
        for section, keys in SECTIONS.items()
        for key in keys
        for other in (None, *SECTIONS)
        if other != section and key not in (SECTIONS[other] if other else SECTIONS)
    ]
    untold = []
    for key, right, other in wrong:
        message = problems(write({key if other is None else f"{other}.{key}": 1}))
        hint = message.partition("Did you mean ")[2].partition("?")[0]
        if right not in hint.split(" or "):
            untold.append((key, other, hint))
    assert untold == []


def test_every_bounded_number_is_tried():
    assert sorted(set(NUMBERS) - set(OUT_OF_RANGE)) == []


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values], ids=str
)
def test_a_value_out_of_range_is_reported_with_its_key(write, key, value):
    message = problems(write({key: value}))
    assert f"  {key}: " in message
    assert "should" in message or "required" in message
    parts = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else []
    assert any(repr(shown) in message for shown in (value, *parts))


@pytest.mark.parametrize("key", CHOICES)
def test_a_value_that_is_not_a_choice_is_answered_with_the_choices(write, seed, key):
    wrong = "".join(random.Random(seed).choices(string.ascii_lowercase, k=8))
    message = problems(write({key: wrong}))
    assert f"  {key}: '{wrong}'" in message
    allowed = next(
        part.get("enum", [part.get("const")]) for part in dict(schemas())[key] if {"enum", "const"} & {*part}
    )
    assert [choice for choice in allowed if f"'{choice}'" not in message] == []


@pytest.mark.parametrize("key", ["train.eval_every", "train.save_every"])
@pytest.mark.parametrize("value", [0.25, 1, 1.0, 7, 250, None, "2e-1"])
def test_an_interval_is_a_share_or_a_number_of_steps(write, key, value):
    found = getattr(load_config(write({key: value})).train, key.partition(".")[2])
    assert found == (0.2 if value == "2e-1" else value)


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    message = problems(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in message
    assert "qlora init" in message


def test_a_folder_is_no_config(tmp_path):
    assert str(tmp_path) in problems(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"model: [unclosed", "line 1, column 17: while parsing a flow sequence expected ',' or ']'"),
        (b"a: [b\nc: d\n", "line 2, column 2: while parsing a flow sequence (which starts in line 1) expected"),
        (b"a: \x00b", "unacceptable character #x0000: special characters are not allowed in "),
        (b"model: base: x", "line 1, column 12: mapping values are not allowed here"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode"),
        (b"a: 1\n\tb: 2\n", "line 2, column 1: while scanning for the next token found character '\\t'"),
    ],
    ids=["unclosed", "begun-earlier", "nul", "two-colons", "not-utf8", "tab"],
)
def test_a_file_that_is_no_yaml_is_named_with_the_place(tmp_path, content, reason):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    message = problems(path)
    assert message.startswith(f"{path} can't be read as YAML: {reason}")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["- model\n- data\n", "", "just words", "3"], ids=["list", "empty", "text", "number"]
)
def test_yaml_that_holds_no_sections_is_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    message = problems(path)
    assert str(path) in message
    assert "model, lora, data, eval, train, export" in message


def test_a_section_that_is_no_group_of_keys_is_named(write):
    assert "  lora: " in problems(write({"lora": [1, 2]}))


def test_a_dumped_config_loads_as_the_same(write, tmp_path, seed):
    rng = random.Random(seed)
    values = {
        "model.revision": rng.choice([None, "main"]),
        "lora.rank": rng.randrange(1, 300),
        "lora.alpha": rng.choice([8, 0.1 + rng.random()]),
        "lora.targets": rng.choice(["all-linear", ["q_proj", "v_proj"], r".*\.[qk]_proj"]),
        "data.eval": rng.choice([None, rng.random() * 0.9, "held-out.jsonl", "größe: 5 # no comment"]),
        "data.train": rng.choice(["a", ["a", {"path": "b", "weight": rng.random() + 0.1, "roles": {"me": "user"}}]]),
        "train.learning_rate": rng.random() * 1e-5 + 1e-12,
        "train.betas": [rng.random(), rng.random()],
        "train.max_steps": rng.choice([None, rng.randrange(1, 10**6)]),
        "train.eval_every": rng.choice([None, rng.random() + 1e-9, rng.randrange(1, 99)]),
        "train.trackers": rng.choice([[], ["tensorboard"]]),
        "export.max_shard_size": rng.choice(["5GB", "1.5MB"]),
    }
    config = load_config(write(values))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)


def test_a_dumped_config_writes_out_every_key(write):
    dumped = yaml.safe_load(dump_config(load_config(write())))
    assert {section: list(keys) for section, keys in dumped.items()} == SECTIONS


def test_changing_values_that_were_read_does_not_change_what_is_read_next():
    parse_yaml("keys: [1]")["keys"].append(2)
    assert parse_yaml("keys: [1]") == {"keys": [1]}


def test_a_config_can_not_be_changed(write):
    config = load_config(write())
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1.5kb", 1500),
        ("7", 7),
        (" 2 TB ", 2 * 10**12),
        ("3G", 3 * 10**9),
        ("12B", 12),
        ("24GiB", 24 * 2**30),
        ("1.5kib", 1536),
    ],
)
def test_a_size_is_read_in_powers_of_ten_or_with_an_i_of_two(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "5 5GB", "5Gi5B", "-1MB", "0", "0.0KB", "5PB", "five"])
def test_a_size_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="5GB"):
        parse_size(text)


def test_paths_that_are_here_become_absolute_and_all_else_stays(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    for path in (tmp_path / "rows.jsonl", tmp_path / "mine.jinja", home / "base"):
        path.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    here = RunConfig.model_validate(
        {
            "model": {"base": "~/base"},
            "data": {
                "train": ["rows.jsonl", "owner/name"],
                "eval": 0.1,
                "chat_template": "mine.jinja",
                "cache_dir": "kept",
            },
            "train": {"output_dir": "run"},
        }
    )
    found = absolute_paths(here)
    assert found.model.base == str(home / "base")
    assert [source.path for source in found.data.train] == [str(tmp_path / "rows.jsonl"), "owner/name"]
    assert found.data.eval == 0.1
    assert found.data.cache_dir == str(tmp_path / "kept")
    assert found.data.chat_template == str(tmp_path / "mine.jinja")
    assert absolute_paths(found) == found
    (tmp_path / "rows.jsonl").unlink()
    elsewhere = RunConfig.model_validate(MINIMAL)
    assert absolute_paths(elsewhere) == elsewhere  # ids on the hub


@pytest.mark.parametrize("name", ["auto", "alpaca", "chatml", "llama3.1", "qwen3-instruct"])
def test_a_built_in_template_is_used_even_if_a_folder_has_its_name(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate({**MINIMAL, "data": {"train": "rows.jsonl", "chat_template": name}})
    assert absolute_paths(config).data.chat_template == name


def test_a_special_token_of_another_kind_is_refused():
    data = {"train": "rows.jsonl", "special_tokens": {"mask_token": "<mask>"}}
    with pytest.raises(ValueError, match="'eos_token' or 'pad_token'"):
        RunConfig.model_validate({**MINIMAL, "data": data})


@pytest.mark.parametrize("key", ["eval_every", "save_every"])
def test_one_point_zero_stays_a_share_and_one_a_number_of_steps(key, tmp_path):
    path = tmp_path / "run.yaml"
    for text, kind in (("1.0", float), ("1", int), ("0.5", float), ("7", int)):
        path.write_text(yaml.safe_dump(MINIMAL))
        once = load_config(path, [f"train.{key}={text}"])
        path.write_text(dump_config(once))
        for config in (once, load_config(path)):
            assert type(getattr(config.train, key)) is kind


def test_a_floor_above_the_peak_of_the_learning_rate_is_refused(write):
    message = problems(write({"train.min_learning_rate": 3e-4}))
    assert "train.min_learning_rate: 0.0003 is above train.learning_rate (0.0002); lower it" in message


@pytest.mark.parametrize(("keys", "expected"), [
    ({"warmup_steps": 10, "warmup_ratio": 0.1},
     "train.warmup_ratio: 0.1 is set, and so is train.warmup_steps (10); set one of them to null"),
    ({"decay_ratio": 0.1}, "train.decay_ratio: 0.1 is set, but train.lr_scheduler is cosine; remove it, or set"),
    ({"lr_scheduler": "wsd", "restarts": 2}, "train.restarts: 2 is set, but train.lr_scheduler is wsd"),
])  # fmt: skip
def test_keys_of_the_schedule_that_contradict_each_other_are_refused(write, keys, expected):
    assert expected in problems(write({f"train.{key}": value for key, value in keys.items()}))


@pytest.mark.parametrize("keys", [{"token_loss": "dft"}, {"label_smoothing": 0.1}])
def test_token_losses_need_an_objective_with_a_loss_of_tokens(keys, monkeypatch, write):
    """The check that each objective without one relies on, tried as if fine-tuning were such an objective."""
    assert load_config(write({f"train.{key}": value for key, value in keys.items()}))
    monkeypatch.setattr("qlora.config.sections.train.TOKEN_LOSS_OBJECTIVES", ("other",))
    assert "changes the loss of tokens, but train.objective sft has none; remove it, or set objective: other" in (
        problems(write({f"train.{key}": value for key, value in keys.items()}))
    )


@pytest.mark.parametrize("keys", [
    {}, {"warmup_steps": 10}, {"warmup_steps": 0}, {"warmup_ratio": 0.0}, {"lr_scheduler": "wsd"},
    {"lr_scheduler": "cosine_restarts", "restarts": 3},
])  # fmt: skip
def test_a_dumped_schedule_loads_again(write, tmp_path, keys):
    config = load_config(write({f"train.{key}": value for key, value in keys.items()}))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    assert (config.train.warmup_steps is None) == (config.train.warmup_ratio is not None)


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_dtypes_have_short_names(short, full, write):
    config = load_config(write({"model.compute_dtype": short, "export.dtype": short}))
    assert (config.model.compute_dtype, config.export.dtype) == (full, full)


def test_keys_inside_a_key_are_named_in_full(write):
    assert load_config(write(), ["train.adversarial.epsilon=0.5"]).train.adversarial.epsilon == 0.5
    assert "  train.adversarial.epsilon: -1 should be greater than 0" in problems(
        write({"train.adversarial": {"epsilon": -1}})
    )
    assert "  train.adversarial.epsilom: unknown key. Did you mean epsilon?" in problems(
        write({"train.adversarial": {"epsilom": 1}})
    )
    assert "  train.adversarial: 0.1 should hold keys: epsilon" in problems(write({"train.adversarial": 0.1}))


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward", "classify"])
@pytest.mark.parametrize(("key", "value", "expected"), [
    ("loss_on", "all", "so data.loss_on: all has no effect; remove it"),
    ("overlong", "split", "which can't be split, but data.overlong is split; set it to truncate, drop or error"),
])  # fmt: skip
def test_objectives_of_whole_rows_refuse_keys_for_tokens(objective, key, value, expected, write):
    found = problems(write({"train.objective": objective, f"data.{key}": value}))
    assert f"objective: {objective} learns" in found
    assert expected in found


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("train.class_weights", "balance", "'balance' should be 'balanced'"),
    ("train.class_weights", {"a": 0}, "0 should be greater than 0"),
    ("data.labels", {True: "yes", "b": "no"}, "has True, but labels and their words are text or whole numbers"),
    ("data.labels", [1.5, "b"], "has 1.5, but labels and their words are text or whole numbers"),
    ("data.retain", "old.jsonl", "measures rows as retain, and so does a set of data.eval; rename that set"),
])  # fmt: skip
def test_a_wrong_label_or_set_is_one_problem(key, value, expected, write):
    keys = {"train.objective": "classify", "data.eval": {"main": "a.jsonl", "retain": "b.jsonl"}, key: value}
    found = problems(write(keys))
    assert "has a problem:" in found
    assert expected in found


def test_labels_that_yaml_reads_as_numbers_are_names(write):
    keys = {"train.objective": "classify", "data.labels": {0: 1, 1: "b "}, "train.class_weights": {1: 2}}
    config = load_config(write(keys))
    assert config.data.labels == {"0": "1", "1": "b "}
    assert config.train.class_weights == {"1": 2.0}
