"""A run continues only from its own checkpoints: with the same settings, base and data, wherever they are."""

import json
import shutil

import pytest

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.training import plan_run, train
from qlora.training.resume import find_start
from tests.tiny import run_config
from tests.training.same_run import assert_same_run, damage, lines_of

pytestmark = pytest.mark.slow


def test_a_checkpoint_elsewhere_can_be_started_from_by_its_path(
    configure, interrupt_after, whole, tmp_path, monkeypatch
):
    interrupt_after(3)
    train(configure("first"))
    monkeypatch.undo()
    checkpoint = shutil.move(tmp_path / "first" / "checkpoints" / "step-000003", tmp_path / "kept")
    for key, value in (("lora__dropout", 0.2), ("train__seed", 3), ("train__rounding", "master")):
        with pytest.raises(
            ConfigError, match=rf"kept was trained with other settings(.|\n)*{key.replace('__', '.')}: .* → "
        ):
            train(configure(**{key: value}), resume=str(checkpoint))
    result = train(configure(), resume=str(checkpoint))
    assert result.steps == 6
    assert lines_of(tmp_path / "run") == [line for line in lines_of(whole) if line["step"] > 3]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continued_from"] == str(checkpoint)


@pytest.mark.parametrize("other", ["base", "rows"])
def test_a_checkpoint_of_another_base_or_other_data_is_refused(other, tiny_base, alpaca_file, tmp_path):
    base, rows = shutil.copytree(tiny_base, tmp_path / "base"), shutil.copy(alpaca_file, tmp_path / "rows.jsonl")
    train(load_config(run_config(base, rows, tmp_path / "first")), stop_at=2)
    if other == "base":
        content = bytearray((base / "model.safetensors").read_bytes())
        content[-1000] ^= 1
        (base / "model.safetensors").write_bytes(content)
    else:
        rows.write_text(rows.read_text().replace("moss", "mist"))
    config = load_config(run_config(base, rows, tmp_path / "run"))
    checkpoint = tmp_path / "first" / "checkpoints" / "step-000002"
    with pytest.raises(
        ConfigError, match=r"model\.safetensors" if other == "base" else r"rows\.jsonl: its training examples"
    ):
        train(config, resume=str(checkpoint))
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(configure, stopped):
    checkpoint = stopped / "checkpoints" / "step-000002"
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing or damaged"):
        train(configure(), resume=str(checkpoint))


def test_a_path_without_a_checkpoint_is_reported(configure, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint or run was found there"):
        train(configure(), resume=str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint or run was found there"):
        plan_run(configure(), resume=str(tmp_path))


def test_a_run_can_be_started_from_by_its_own_path(configure, whole, tmp_path):
    train(configure("first", train__save_every=2), stop_at=3)
    result = train(configure(), resume=str(tmp_path / "first"))
    assert (result.steps, result.trained_steps) == (6, 3)
    assert lines_of(tmp_path / "run") == [line for line in lines_of(whole) if line["step"] > 3]
    final = train(configure("longer", train__max_steps=7), resume=str(whole / "adapter"))
    assert (final.steps, final.trained_steps) == (7, 1)
    assert any("The learning rate jumps" in note for note in final.notes)


def test_the_same_command_with_a_checkpoint_continues_with_what_it_started(configure, whole, stopped_run, tmp_path):
    checkpoint = str(stopped_run / "checkpoints" / "step-000002")
    for stop, trained in ((3, 1), (5, 2), (None, 1)):
        assert train(configure(), resume=checkpoint, stop_at=stop).trained_steps == trained
    # The stop at step 2 left the evaluation due there to the run that continues.
    assert lines_of(tmp_path / "run") == [
        line for line in lines_of(whole) if line["step"] > 2 or (line["step"] == 2 and "eval_loss" in line)
    ]


def test_a_path_to_an_older_checkpoint_of_the_run_is_refused(configure, interrupt_after, tmp_path):
    interrupt_after(5)
    train(configure(train__save_every=2))
    older = tmp_path / "run" / "checkpoints" / "step-000004"
    with pytest.raises(ConfigError, match="newer checkpoints .*step-000005.* To start from step-000004, choose"):
        train(configure(train__save_every=2), resume=str(older))


def test_a_moved_project_continues(tiny_base, alpaca_file, tmp_path):
    """Base, data and run are identified by their contents, not by their paths."""
    place = tmp_path / "here"
    for run in ("whole", "run"):
        place.mkdir(exist_ok=True)
        for source in (tiny_base, alpaca_file):
            if not (place / source.name).exists():
                (shutil.copytree if source.is_dir() else shutil.copy)(source, place / source.name)
        config = run_config(place / tiny_base.name, place / alpaca_file.name, place / run)
        train(load_config(config), stop_at=3 if run == "run" else None)
    moved = place.rename(tmp_path / "there")
    config = run_config(moved / tiny_base.name, moved / alpaca_file.name, moved / "run")
    assert train(load_config(config)).status == "finished"
    assert lines_of(moved / "run") == lines_of(moved / "whole")


@pytest.mark.parametrize(("key", "value"), [
    ("lora__rank", 8),
    ("train__learning_rate", 2e-2),
    ("train__seed", 1),
    ("data__max_seq_len", 96),
    ("data__packing", False),
    ("model__double_quant", False),
])  # fmt: skip
def test_another_setting_is_no_continuation(key, value, configure, stopped):
    with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
        train(configure(**{key: value}))


def test_tokenized_data_may_be_kept_elsewhere_within_a_run(configure, interrupt_after, whole, tmp_path, monkeypatch):
    """A run whose disk filled up continues with its cache on another."""
    interrupt_after(3)
    train(configure(data__cache_dir=str(tmp_path / "one")))
    monkeypatch.undo()
    assert train(configure(data__cache_dir=str(tmp_path / "other"))).status == "finished"
    assert_same_run(tmp_path / "run", whole)


def test_another_base_under_the_same_name_is_no_continuation(tiny_base, alpaca_file, interrupt_after, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = load_config(run_config(base, alpaca_file, tmp_path / "run"))
    interrupt_after(2)
    train(config)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        train(config)


@pytest.mark.parametrize("changed", [
    lambda text: text + '{"instruction": "One more", "output": "row"}\n',
    lambda text: text.replace("moss", "mist"),  # as many rows and tokens
])  # fmt: skip
def test_other_data_under_the_same_name_is_no_continuation(changed, tiny_base, alpaca_file, interrupt_after, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(alpaca_file.read_text())
    config = load_config(run_config(tiny_base, data, tmp_path / "run"))
    interrupt_after(2)
    train(config)
    data.write_text(changed(data.read_text()))
    with pytest.raises(ConfigError, match=r"rows\.jsonl: its training examples have changed"):
        train(config)


def test_what_was_in_use_may_not_change_within_a_run(configure, stopped):
    path = stopped / "run.json"
    whole = path.read_text()
    for key, value, line in (
        ("micro_batches", 6, "micro-batches of a step, over all processes: 6 → 2"),
        ("compute_dtype", "float16", "compute_dtype: float16 → "),
        ("rounding", "master", "rounding: master → "),
        ("loss", "fused kernel", "loss: fused kernel → plain torch"),
        ("dequantize", "fused kernel: it gave", "dequantize: fused kernel → bitsandbytes"),
        ("activations", "fused kernels", "activations: fused kernels → plain torch"),
    ):
        record = json.loads(whole)
        record["in_use"][key] = value
        path.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=rf"  {line}.*\n.* --fresh"):
            train(configure())
        assert json.loads(path.read_text()) == record
    record = json.loads(whole)
    record["in_use"]["activations"] = "plain torch: it fails (Error: /tmp/tmp1234/main.c)"  # for another reason
    record["in_use"]["loss"] = None  # written by an earlier version
    path.write_text(json.dumps(record))
    assert train(configure()).status == "finished"


def test_a_checkpoint_older_than_the_newest_is_reported_by_its_number(configure, stopped):
    config, folder = configure(), stopped / "checkpoints"
    (folder / "step-000002").rename(folder / "step-999999")
    shutil.copytree(folder / "step-999999", folder / "step-1000000")
    run = RunDirectory(stopped)
    assert find_start(run, config, "auto").checkpoint == folder / "step-1000000"
    with pytest.raises(ConfigError, match="newer checkpoints .*step-999999"):
        find_start(run, config, str(folder / "step-999999"))
