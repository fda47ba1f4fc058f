"""A step that fails is reported with its rows, saved for replay, and skipped if the config says so."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.errors import CheckpointError, ModelError
from qlora.model import load_run
from qlora.training import replay, train
from qlora.training.guard import MAX_SKIPPED
from qlora.training.progress import WATCH_AFTER, Progress
from tests.cli import run
from tests.tiny import POISON, make_base, run_config, write_jsonl

pytestmark = pytest.mark.slow


def write_rows(path, num_rows, poisoned_rows):
    """Write rows of text, some of which end in the poisoned letter."""
    rows = [{"text": f"row {row} of the book{POISON * (row in poisoned_rows)} ends"} for row in range(1, num_rows + 1)]
    return write_jsonl(path, rows)


def config_of(base, folder, poisoned_rows=(17,), num_rows=24, name="run", **settings):
    data = write_rows(folder / "rows.jsonl", num_rows, poisoned_rows)
    defaults = {
        "data__eval": None, "data__packing": False, "train__micro_batch_size": 2,
        "train__gradient_accumulation_steps": 2, "train__max_steps": 6, "train__save_every": 1,
    }  # fmt: skip
    return load_config(run_config(base, data, folder / name, **(defaults | settings)))


def lines_of(config):
    return RunDirectory(config.train.output_dir).read_metrics()


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "apart"])
def stopped(request, poisoned_base, tmp_path_factory):
    """Return a run that met its poisoned row, its error, and the saved step; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    config = config_of(poisoned_base, folder, data__packing=request.param, data__max_seq_len=64)
    with pytest.raises(ModelError) as raised:
        train(config)
    (kept,) = (folder / "run" / "replay").iterdir()
    return config, str(raised.value), kept


def test_a_step_that_is_not_finite_stops_the_run_and_names_the_rows(stopped):
    config, message, kept = stopped
    assert "the loss is nan" in message
    assert "17" in message.partition("It trained on rows ")[2].partition(" of ")[0].replace(",", " ").split()
    assert f"--replay {kept}." in message
    step = int(kept.stem.removeprefix("step-"))
    steps = [line["step"] for line in lines_of(config)]
    assert steps == list(range(1, step))  # the step itself was not logged
    run = RunDirectory(config.train.output_dir)
    assert not run.read_record().is_finished
    if step > 1:  # the saved state is that after the step before
        assert run.list_checkpoints()[-1].name == f"step-{step - 1:06d}"


def test_the_saved_step_shows_where_it_breaks(stopped):
    config, _, kept = stopped
    report = replay(config, kept)
    assert not report.is_finite
    assert math.isnan(report.loss)
    assert math.isnan(report.recorded_loss)
    (broken,) = report.broken  # one micro-batch has the row
    assert broken.first_nonfinite == "model.embed_tokens"
    assert 17 in next(iter(report.rows.values()))
    json.loads(json.dumps(report.as_dict(), allow_nan=False))


def test_a_saved_step_is_finite_with_a_remedy(stopped, tmp_path):
    config, _, kept = stopped
    sound = make_base(tmp_path / "sound", 1, GemmaConfig, tie_word_embeddings=False)
    remedied = config.model_copy(update={"model": config.model.model_copy(update={"base": str(sound)})})
    report = replay(remedied, kept)
    assert report.is_finite
    assert report.broken == []
    assert math.isfinite(report.loss)
    assert report.grad_norm > 0


def test_a_saved_step_starts_from_the_values_that_it_had(stopped, tmp_path):
    config, _, kept = stopped
    step = int(kept.stem.removeprefix("step-"))
    checkpoint = RunDirectory(config.train.output_dir).checkpoint(step - 1)
    if not checkpoint.exists():
        pytest.skip("the first step was the poisoned one")
    saved = load_file(checkpoint / "adapter_model.safetensors")
    trained = load_file(kept)["trained"]
    for tensor in saved.values():
        assert any(
            torch.equal(trained[at : at + tensor.numel()], tensor.flatten()) for at in range(0, len(trained), 256)
        )


def test_a_file_that_is_not_a_saved_step_is_refused(stopped, tmp_path):
    config, _, kept = stopped
    other = tmp_path / "other.safetensors"
    save_file({"trained": torch.zeros(3)}, other)
    for path in (other, tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match="not a step that a run saved"):
            replay(config, path)
    wider = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 8})})
    with pytest.raises(CheckpointError, match=r"Replay it with the config\.yaml of its run"):
        replay(wider, kept)


@pytest.mark.parametrize("damage", [
    lambda settings, tensors: settings.clear(),
    lambda settings, tensors: settings.pop("rows"),
    lambda settings, tensors: settings.pop("packed"),
    lambda settings, tensors: settings.update(seed="0"),
    lambda settings, tensors: settings.update(step=-1),
    lambda settings, tensors: settings.update(loss_scale=0),
    lambda settings, tensors: settings.update(processes=3),
    lambda settings, tensors: settings.update(label_weights=["1"]),
    lambda settings, tensors: settings.update(processes=[[[99]]]),
    lambda settings, tensors: settings["processes"][0].append([]),
    lambda settings, tensors: tensors.update(lengths=tensors["lengths"][:-1]),
    lambda settings, tensors: tensors.update(lengths=-tensors["lengths"]),
    lambda settings, tensors: tensors.update(input_ids=tensors["input_ids"].float()),
    lambda settings, tensors: tensors["input_ids"].add_(10_000),
])  # fmt: skip
def test_a_saved_step_with_impossible_values_is_refused(damage, stopped, tmp_path):
    config, _, kept = stopped
    tensors = load_file(kept)
    with safe_open(kept, framework="pt") as file:
        settings = json.loads(file.metadata()["step"])
    damage(settings, tensors)
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata={"step": json.dumps(settings)})
    with pytest.raises(CheckpointError, match=r"not a step that a run saved|ids outside the base's vocabulary"):
        replay(config, path)


def test_a_run_that_may_skip_continues_and_reports_it(poisoned_base, tmp_path, capsys):
    config = config_of(poisoned_base, tmp_path, train__on_nonfinite="skip")
    result = train(config, show_progress=True)
    message = capsys.readouterr().err.splitlines()
    (kept,) = (tmp_path / "run" / "replay").iterdir()
    assert f"To see where it breaks: qlora train --replay {kept}." in message
    assert any("skipped: the loss is nan" in line and line.endswith("rows.jsonl.") for line in message)  # in one piece
    assert result.status == "finished"
    assert result.steps == 6
    lines = lines_of(config)
    (skipped,) = (line for line in lines if "skipped" in line)
    assert 17 in next(iter(skipped["rows"].values()))
    assert len(next(iter(skipped["rows"].values()))) == 2  # the rows of its micro-batch, not of the whole step
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [step for step in range(1, 7) if step != skipped["step"]]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in losses)
    progress = json.loads((RunDirectory(tmp_path / "run").checkpoint(6) / "progress.json").read_text())
    assert progress["skipped"] == 1
    model, _ = load_run(tmp_path / "run")
    assert all(value.isfinite().all() for name, value in model.named_parameters() if ".lora_" in name)


def test_a_stopped_run_continues_with_the_setting_that_its_error_names(stopped, tmp_path):
    config, message, _ = stopped
    assert "set train.on_nonfinite: skip" in message
    copy = shutil.copytree(config.train.output_dir, tmp_path / "run")
    section = config.train.model_copy(update={"on_nonfinite": "skip", "output_dir": str(copy)})
    config = config.model_copy(update={"train": section})
    assert train(config).status == "finished"
    assert [line["step"] for line in lines_of(config)] == list(range(1, 7))


def test_a_run_that_skips_all_the_time_stops(poisoned_base, tmp_path):
    config = config_of(
        poisoned_base, tmp_path, poisoned_rows=range(5, 25), train__on_nonfinite="skip", train__max_steps=40,
        train__gradient_accumulation_steps=1,
    )  # fmt: skip
    with pytest.raises(ModelError, match=f"{MAX_SKIPPED} steps were skipped already"):
        train(config)
    assert sum("skipped" in line for line in lines_of(config)) == MAX_SKIPPED


def test_a_loss_spike_is_reported_with_its_rows(tiny_base, tmp_path, generator):
    """Rows of one word are memorized; a row of noise among them is a spike."""
    rows = [{"text": "tin " * 12} for _ in range(64)]
    letters = torch.randint(33, 126, (48,), generator=generator).tolist()
    rows[40] = {"text": "".join(map(chr, letters))}
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {
        "data__eval": None, "data__packing": False, "train__micro_batch_size": 1,
        "train__gradient_accumulation_steps": 1, "train__save_every": None, "train__lr_scheduler": "constant",
    }  # fmt: skip
    config = load_config(run_config(tiny_base, data, tmp_path / "run", train__max_steps=2 * 64, **settings))
    train(config)
    leaps = [line for line in lines_of(config) if "loss_spike" in line]
    assert leaps
    assert leaps[-1]["step"] > 64
    assert list(leaps[-1]["rows"].values()) == [[41]]


def test_noisy_losses_are_not_reported_as_spikes(generator):
    progress = Progress()
    losses = 2 + 0.3 * torch.randn(2000, generator=generator)
    found = []
    for progress.step, loss in enumerate(losses.tolist()):
        found.append(progress.is_spike(loss))
    assert sum(found) <= 2


def test_a_loss_that_stays_high_is_reported_once(generator):
    progress = Progress()
    losses = torch.cat([torch.full((200,), 2.0), torch.full((400,), 4.0)]) + 0.05 * torch.randn(
        600, generator=generator
    )
    found = []
    for progress.step, loss in enumerate(losses.tolist()):
        found.append(progress.is_spike(loss))
    assert not any(found[:200])
    assert found[200]
    assert not any(found[400:])


def test_the_first_steps_are_only_watched():
    progress = Progress()
    found = []
    for progress.step in range(WATCH_AFTER):
        found.append(progress.is_spike(100.0 if progress.step == WATCH_AFTER - 1 else 1.0))
    assert not any(found)


def test_the_command_replays_with_the_config_of_the_run_that_saved_the_step(stopped):
    *_, kept = stopped
    done = run("train", "--replay", kept)
    assert done.code == 1
    assert "the first breaks in model.embed_tokens" in done.out
    report = run("train", kept.parent.parent / "config.yaml", "model.compute_dtype=float32", "--replay", kept, "--json")
    assert json.loads(report.out)["recorded_loss"] == "nan"
