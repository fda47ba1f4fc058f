"""Weights that are split over processes or on the host train what weights on the device train."""

import json
import os
import re

import pytest
from transformers import LlamaConfig

from qlora.checkpoint import save_checkpoint
from qlora.config import load_config
from qlora.errors import ConfigError, ModelError
from qlora.export import merge
from qlora.layers.sharding import ShardedWeights
from qlora.proof import verify
from qlora.training import run as run_module
from qlora.training import saving, train
from tests.moe import make_moe
from tests.tiny import make_base, run_config, write_jsonl
from tests.training.ranks import call_in, call_in_two, needs_fork, train_in, train_in_two
from tests.training.same_run import assert_same_run, lines_of

pytestmark = [needs_fork, pytest.mark.slow]

# One process takes as many micro-batches as several take together, so that the same numbers are added.
ONE = {"train__micro_batch_size": 1, "train__gradient_accumulation_steps": 2}
EACH = {"train__micro_batch_size": 1, "train__gradient_accumulation_steps": 1}

# Each kind of adapter, initial value, level and objective once.
KINDS = {
    "dora + reconstruct + full": {"lora__kind": "dora", "lora__init": "reconstruct", "model__recompute": "full"},
    "rows + none + fp16": {
        "lora__kind": "rows", "lora__alpha": 32, "model__recompute": "none", "model__compute_dtype": "float16",
    },
    "embeddings + upper layers + mlp": {
        "lora__modules_to_save": ["embed_tokens", "lm_head"], "lora__layers": [2, 3], "model__recompute": "mlp",
    },
    "experts + attention": {"lora__expert_rank": 2, "model__recompute": "attention"},
    "dpo + pissa": {"train__objective": "dpo", "lora__init": "pissa"},
    "answers": {"eval__metrics": ["exact_match"], "eval__rows": 3, "eval__max_new_tokens": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory):
    """A random Llama of four layers, of which two are on the device at a time."""
    return make_base(tmp_path_factory.mktemp("deep") / "llama", 3, LlamaConfig, num_hidden_layers=4)


def in_use(folder):
    return json.loads((folder / "run.json").read_text())["in_use"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda name: name.replace(" ", "-"))
def test_every_kind_of_run_is_the_same_bit_for_bit(kind, deep_base, alpaca_file, pairs_file, tmp_path):
    base = make_moe(tmp_path / "moe", "qwen3_moe", 5, num_hidden_layers=4) if "experts" in kind else deep_base
    data = pairs_file if "dpo" in kind else alpaca_file
    shared = {"train__max_steps": 3, "model__compute_dtype": "float32", "data__cache_dir": str(tmp_path / "cache")}

    def write(name, **own):
        return run_config(base, data, tmp_path / name, **{**shared, **KINDS[kind], **own})

    train(load_config(write("device", **ONE)))
    train(load_config(write("host", model__weights="host", **ONE)))
    train_in_two(write("sharded", model__weights="sharded", **EACH))
    for weights in ("device", "host", "sharded"):
        assert in_use(tmp_path / weights)["weights"] == weights
        assert_same_run(tmp_path / weights, tmp_path / "device")


def move(config):
    """Train a run in three sessions with its weights in different places."""
    for place, stop_at in (("sharded", 6), ("device", 9), ("host", None)):
        train(load_config(config, [f"model.weights={place}"]), stop_at=stop_at)


def test_runs_of_20_steps_continue_elsewhere_and_merge(deep_base, alpaca_file, tmp_path):
    """Two processes have their weights on the host each; a run moves between places, and its merge is verified."""
    shared = {"model__compute_dtype": "float32", "train__max_steps": 20, "train__save_every": 10}

    def write(name, **own):
        return run_config(deep_base, alpaca_file, tmp_path / name, **{**shared, **own})

    train(load_config(write("device", **ONE)))
    train_in_two(write("hosts", model__weights="host", **EACH))
    assert_same_run(tmp_path / "hosts", tmp_path / "device")
    call_in_two(move, str(write("moved", **EACH)))
    assert in_use(tmp_path / "moved")["weights"] == "host"
    assert_same_run(tmp_path / "moved", tmp_path / "device")
    merge(tmp_path / "hosts", tmp_path / "merged")
    assert verify(tmp_path / "hosts", tmp_path / "merged").matches


def test_three_processes_with_fewer_rows_than_processes_in_some_steps(deep_base, alpaca_file, tmp_path):
    """32 rows for training: in the last step of an epoch, one process has a row and the others have none."""
    shared = {
        "model__compute_dtype": "float32", "data__packing": False, "train__max_steps": 12, "train__micro_batch_size": 1,
    }  # fmt: skip
    one = run_config(deep_base, alpaca_file, tmp_path / "one", train__gradient_accumulation_steps=3, **shared)
    train(load_config(one))
    train_in(3, run_config(
        deep_base, alpaca_file, tmp_path / "three", model__weights="sharded",
        train__gradient_accumulation_steps=1, **shared,
    ))  # fmt: skip
    losses = [[line["loss"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in line]
              for name in ("one", "three")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_continues_with_other_numbers_of_processes(deep_base, alpaca_file, tmp_path):
    """Two processes, then one, then three, with six micro-batches a step each."""
    settings = {"model__compute_dtype": "float32", "train__micro_batch_size": 1, "train__max_steps": 6}
    settings["train__optimizer"] = "adamw_32bit"
    whole = load_config(run_config(
        deep_base, alpaca_file, tmp_path / "whole", train__gradient_accumulation_steps=6, **settings
    ))  # fmt: skip
    config = str(run_config(deep_base, alpaca_file, tmp_path / "run", **settings))
    train(whole)
    for count, stop_at in ((2, 2), (1, 4), (3, None)):
        shared = "device" if count == 1 else "sharded"
        own = [f"train.gradient_accumulation_steps={6 // count}", f"model.weights={shared}"]
        notes = call_in(count, train_until, config, own, stop_at)[0]
        said = [note for note in notes if note.startswith("The run continues with")]
        before = {2: None, 1: 2, 3: 1}[count]
        assert bool(said) == (before is not None)
        assert not said or re.match(rf"The run continues with {count} process(es)? instead of {before}:", said[0])
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("whole", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    with pytest.raises(
        ConfigError, match=r"over all processes: 6 → 7\nFor 1 process, set train.gradient_acc.*: 6, start"
    ):
        train(load_config(config, ["train.gradient_accumulation_steps=7", "train.max_steps=8"]))


def test_a_session_killed_while_it_begins_with_other_processes_leaves_a_run_that_continues(
    deep_base, alpaca_file, tmp_path, monkeypatch
):
    """One process continues a run of two, and is killed between its record and its config, which has two's key."""
    settings = {"model__compute_dtype": "float32", "train__micro_batch_size": 1, "train__max_steps": 4}
    whole, cut = (
        str(run_config(deep_base, alpaca_file, tmp_path / name, train__gradient_accumulation_steps=1, **settings))
        for name in ("whole", "cut")
    )
    for config in (whole, cut):
        call_in_two(train_until, config, [], 2)
    own = ["train.gradient_accumulation_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_text", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(load_config(cut, own))
    assert in_use(tmp_path / "cut")["processes"] == 1
    assert load_config(tmp_path / "cut" / "config.yaml").train.gradient_accumulation_steps == 1
    for config in (whole, cut):
        train(load_config(config, own))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def raise_interrupt(*_):
    raise KeyboardInterrupt


def train_until(config, overrides, stop_at):
    """Train a session, and return its notes."""
    return train(load_config(config, overrides), stop_at=stop_at).notes


def die_in(place, config, folder):
    """Train until a process ends without a word, and write what the other one raises."""
    is_second = os.environ["RANK"] == "1"
    after_layer, passed = ShardedWeights._after_layer, []

    def end_in_a_step(self, *arguments):
        if (folder / "run" / "checkpoints" / "step-000004").is_dir():
            passed.append(self)
        if len(passed) > 5:  # in the middle of the next step
            os._exit(9)
        after_layer(self, *arguments)

    def end_in_a_save(folder, *arguments, **options):
        if folder.name == "step-000004":
            folder.with_name(f"{folder.name}.half").mkdir()
            os._exit(9)
        save_checkpoint(folder, *arguments, **options)

    if place == "step" and is_second:
        ShardedWeights._after_layer = end_in_a_step
    if place == "save" and not is_second:
        saving.save_checkpoint = end_in_a_save
    try:
        train(load_config(config))
    except ModelError as error:
        folder.joinpath("raised").write_text(str(error))
    os._exit(1)


@pytest.mark.parametrize("place", ["step", "save"])
def test_a_process_that_is_killed_ends_the_run_which_continues(place, deep_base, alpaca_file, tmp_path):
    settings = {"model__weights": "sharded", "train__save_every": 2, "train__max_steps": 8, "data__eval": None}
    whole, config = (run_config(deep_base, alpaca_file, tmp_path / name, **settings) for name in ("whole", "run"))
    train_in_two(whole)
    with pytest.raises(AssertionError, match="ended without an answer"):
        call_in_two(die_in, place, str(config), tmp_path)
    assert (tmp_path / "raised").read_text().startswith("Another process of the run has ended; its last message")
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))
    assert saved
    assert "step-000008" not in saved
    train_in_two(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Passes that are not a forward with its backward, and gradients that not all layers get.
UNEVEN = {
    "kl": {"train__keep": {"kl": 0.1}},
    "adversarial": {"train__adversarial": {"epsilon": 0.05}, "lora__layers": [2, 3]},
    "upper layers": {"lora__layers": [2, 3]},
}


def stop_and_continue(config):
    """Train to a step after which processes have different work, and from there."""
    train(load_config(config), stop_at=4)
    train(load_config(config))


@pytest.mark.parametrize("kind", UNEVEN)
def test_processes_with_different_work_stay_in_step(kind, deep_base, tmp_path):
    """Of nine rows, one process has the last."""
    rows = [{"instruction": f"Repeat {number}", "output": "tin " * (number + 1)} for number in range(9)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    shared = {
        "data__packing": False, "data__eval": None, "train__eval_every": None, "train__max_steps": 10,
        "train__micro_batch_size": 1, "model__compute_dtype": "float32", "train__save_every": None, **UNEVEN[kind],
    }  # fmt: skip
    one = run_config(deep_base, data, tmp_path / "one", train__gradient_accumulation_steps=2, **shared)
    train(load_config(one))
    own = run_config(
        deep_base, data, tmp_path / "two", model__weights="sharded", train__gradient_accumulation_steps=1, **shared
    )
    call_in_two(stop_and_continue, str(own))
    losses = [[line["loss"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in line]
              for name in ("one", "two")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
