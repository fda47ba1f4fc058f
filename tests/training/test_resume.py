"""A continued run is the uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from qlora.checkpoint import RunDirectory
from qlora.config import dump_config, load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.training import train
from qlora.training.metrics import MetricsLog
from qlora.training.resume import find_start
from tests.tiny import run_config

TIMINGS = ("tokens_per_second", "peak_memory")


def lines_of(folder):
    """What was logged, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(folder, expected):
    assert lines_of(folder) == lines_of(expected)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    newest, other = (sorted((run / "checkpoints").iterdir())[-1] for run in (folder, expected))
    assert newest.name == other.name
    states = [load_file(checkpoint / "optimizer.safetensors") for checkpoint in (newest, other)]
    assert all(states[0][key].equal(states[1][key]) for key in states[1])


@pytest.fixture
def interrupt_after(monkeypatch):
    """Sends this process a signal while the given step is at hand."""

    def arrange(step, number=signal.SIGINT):
        original = MetricsLog.log_step

        def log_step(self, progress, report):
            original(self, progress, report)
            if progress.step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(MetricsLog, "log_step", log_step)

    yield arrange
    monkeypatch.undo()


@pytest.fixture
def configure(tiny_base, alpaca_file, tmp_path):
    def build(name="run", **settings):
        settings = {"lora__dropout": 0.1, "train__eval_every": 2, "train__save_every": 100, **settings}
        return load_config(run_config(tiny_base, alpaca_file, tmp_path / name, **settings))

    return build


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_an_interrupted_run_goes_on_as_if_it_never_stopped(
    optimizer, rounding, packing, configure, interrupt_after, tmp_path, monkeypatch
):
    settings = {"train__optimizer": optimizer, "train__rounding": rounding, "train__max_steps": 10}
    settings["data__packing"] = packing
    train(configure("whole", **settings))
    interrupt_after(3)
    first = train(configure(**settings))
    assert (first.status, first.steps) == ("interrupted", 3)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    interrupt_after(9)  # the second epoch has begun
    assert train(configure(**settings)).steps == 9
    monkeypatch.undo()
    last = train(configure(**settings))
    assert (last.status, last.steps, len(last.losses)) == ("finished", 10, 10)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint(configure, tmp_path, monkeypatch):
    """Lines after the checkpoint are written anew, and not twice."""
    train(configure("whole", train__save_every=2))
    original = MetricsLog.log_step

    def log_step(self, progress, report):
        original(self, progress, report)
        if progress.step == 5:
            raise SystemExit("killed")

    monkeypatch.setattr(MetricsLog, "log_step", log_step)
    with pytest.raises(SystemExit):
        train(configure(train__save_every=2))
    assert [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line][-1] == 5
    monkeypatch.undo()
    assert train(configure(train__save_every=2)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(configure, tmp_path, monkeypatch):
    train(configure("whole"))
    monkeypatch.setattr(MetricsLog, "log_step", lambda *arguments: sys.exit("killed"))
    with pytest.raises(SystemExit):
        train(configure())
    monkeypatch.undo()
    assert train(configure()).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_interruption_in_the_last_step_is_the_end(configure, interrupt_after, tmp_path):
    interrupt_after(6)
    assert train(configure()).status == "finished"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_elsewhere_can_be_started_from_by_its_path(configure, interrupt_after, tmp_path, monkeypatch):
    train(configure("whole"))
    interrupt_after(3)
    train(configure("first"))
    monkeypatch.undo()
    checkpoint = shutil.move(tmp_path / "first" / "checkpoints" / "step-000003", tmp_path / "kept")
    result = train(configure(), resume=str(checkpoint))
    assert result.steps == 6
    assert lines_of(tmp_path / "run") == [line for line in lines_of(tmp_path / "whole") if line["step"] > 3]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continued_from"] == str(checkpoint)


def test_a_path_without_a_checkpoint_is_told(configure, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint there"):
        train(configure(), resume=str(tmp_path))


def test_a_path_to_an_older_checkpoint_of_the_run_is_refused(configure, interrupt_after, tmp_path):
    interrupt_after(5)
    train(configure(train__save_every=2))
    older = tmp_path / "run" / "checkpoints" / "step-000004"
    with pytest.raises(ConfigError, match="newer than step-000004"):
        train(configure(train__save_every=2), resume=str(older))


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(configure, interrupt_after, tmp_path):
    interrupt_after(3)
    train(configure())
    path = tmp_path / "run" / "checkpoints" / "step-000003" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    before = lines_of(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing or damaged"):
        train(configure())
    assert lines_of(tmp_path / "run") == before


@pytest.mark.parametrize(("key", "value"), [
    ("lora__rank", 8),
    ("train__learning_rate", 2e-2),
    ("train__seed", 1),
    ("data__max_seq_len", 96),
    ("data__packing", False),
    ("model__double_quant", False),
])  # fmt: skip
def test_another_setting_is_no_continuation(key, value, configure, interrupt_after):
    interrupt_after(2)
    train(configure())
    with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
        train(configure(**{key: value}))


def test_tokenized_data_may_be_kept_elsewhere_within_a_run(configure, interrupt_after, tmp_path, monkeypatch):
    """A run whose disk filled up goes on with its cache on another."""
    train(configure("whole"))
    interrupt_after(3)
    train(configure(data__cache_dir=str(tmp_path / "one")))
    monkeypatch.undo()
    assert train(configure(data__cache_dir=str(tmp_path / "other"))).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


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


def test_other_data_under_the_same_name_is_no_continuation(tiny_base, alpaca_file, interrupt_after, tmp_path):
    data = shutil.copy(alpaca_file, tmp_path / "rows.jsonl")
    config = load_config(run_config(tiny_base, data, tmp_path / "run"))
    interrupt_after(2)
    train(config)
    with data.open("a") as file:
        file.write('{"instruction": "One more", "output": "row"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl"):
        train(config)


def test_other_data_of_equal_counts_is_no_continuation(tiny_base, alpaca_file, interrupt_after, tmp_path):
    data = shutil.copy(alpaca_file, tmp_path / "rows.jsonl")
    config = load_config(run_config(tiny_base, data, tmp_path / "run"))
    interrupt_after(2)
    train(config)
    data.write_text(data.read_text().replace("moss", "mist"))
    with pytest.raises(ConfigError, match=r"rows\.jsonl: what is learnt from it"):
        train(config)


def test_what_was_in_use_may_not_change_within_a_run(configure, interrupt_after, tmp_path, monkeypatch):
    interrupt_after(2)
    train(configure())
    monkeypatch.undo()
    path = tmp_path / "run" / "run.json"
    whole = path.read_text()
    for key, value in (("processes", 2), ("compute_dtype", "float16"), ("rounding", "master")):
        record = json.loads(whole)
        now = record["in_use"][key]
        record["in_use"][key] = value
        path.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=rf"  {key}: {value} before, {now} now$"):
            train(configure())
        assert json.loads(path.read_text()) == record
    path.write_text(whole)
    assert train(configure()).status == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_is_told(number, configure, interrupt_after, tmp_path):
    interrupt_after(2, number)
    result = train(configure())
    assert (result.status, result.steps, result.signal) == ("interrupted", 2, number)
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_an_unfinished_last_line_is_passed_over(configure, interrupt_after, tmp_path, monkeypatch):
    train(configure("whole"))
    interrupt_after(3)
    train(configure())
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')
    assert train(configure()).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_broken_line_in_the_middle_is_named(configure, interrupt_after, tmp_path, monkeypatch):
    interrupt_after(3)
    train(configure())
    monkeypatch.undo()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is damaged"):
        train(configure())
    assert path.read_bytes() == before


def test_a_copy_of_a_checkpoint_is_neither_continued_from_nor_removed(
    configure, interrupt_after, tmp_path, monkeypatch
):
    interrupt_after(2)
    train(configure(train__save_every=1))
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-000001", folder / "step-000200-backup")
    result = train(configure(train__save_every=1, train__keep_checkpoints=1))
    assert (result.status, result.steps) == ("finished", 6)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continued_from"].endswith("step-000002")
    assert {path.name for path in folder.iterdir()} == {"step-000006", "step-000200-backup"}


def test_a_checkpoint_older_than_the_newest_is_told_by_its_number(configure, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step-999999", "step-1000000"):
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.json").write_text("{}")
    config = configure()
    run = RunDirectory(tmp_path / "run")
    run.config.write_text(dump_config(config))
    run.record.write_text("{}")
    assert find_start(run, config, "auto") == folder / "step-1000000"
    with pytest.raises(ConfigError, match="newer than step-999999"):
        find_start(run, config, str(folder / "step-999999"))


@pytest.mark.slow
def test_the_command_stops_at_ctrl_c_with_its_state_saved_and_goes_on(configure, tmp_path):
    settings = {"train__max_steps": 40, "train__eval_every": 20}
    train(configure("whole", **settings))
    configure(**settings)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "-c", "from qlora.cli.main import main; main()", "train", str(tmp_path / "run.yaml")]

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        shown = []
        for line in process.stderr:
            shown.append(line)
            if line.startswith("step 2/40  loss"):
                process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130, "".join(shown)
    assert "interrupted" in output
    assert "Traceback" not in "".join(shown)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.name.removeprefix("step-")) < 40
    assert (checkpoint / "manifest.json").is_file()

    assert train(configure(**settings)).status == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "whole")
