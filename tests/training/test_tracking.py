"""Trackers: a run's settings, numbers, samples and page arrive in each that is installed."""

import json
from pathlib import Path

import pytest

from qlora.errors import ConfigError
from qlora.processes import Processes
from qlora.training import train
from qlora.training.tracking import Tracking, send_files

SAMPLES = {"train__samples": {"prompts": 2, "every": 3, "max_new_tokens": 4}}

pytestmark = pytest.mark.slow


@pytest.fixture
def tracked(configure):
    """Return a function that trains with a tracker, and returns the run's directory."""

    def run(tracker):
        return train(configure(train__trackers=[tracker], **SAMPLES)).run_dir

    return run


def numbers_of(run_dir, key):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def test_tensorboard_gets_settings_numbers_and_samples(tracked):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tracked("tensorboard")
    events = EventAccumulator(str(run_dir / "qlora"))
    events.Reload()
    for key in ("loss", "eval_loss"):
        logged = {event.step: event.value for event in events.Scalars(key)}
        assert logged == pytest.approx(numbers_of(run_dir, key), rel=1e-6)
    texts = {tag for tag in events.Tags()["tensors"] if tag.startswith("sample/")}
    assert texts == {"sample/1/text_summary", "sample/2/text_summary"}
    assert [event.step for event in events.Tensors("sample/1/text_summary")] == [0, 3, 6]
    (settings,) = (run_dir / "qlora").glob("*/hparams.yml")
    assert "train.learning_rate: 0.01" in settings.read_text()


def test_wandb_gets_everything_offline(tracked, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracked("wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    saved = {path.name for path in (folder / "files").rglob("*") if path.is_file()}
    assert {"report.html", "samples.jsonl"} <= saved
    assert any(name.startswith("samples_") and name.endswith(".table.json") for name in saved)
    written = next(folder.glob("*.wandb")).read_bytes()
    assert b"train.learning_rate" in written
    assert b"eval_loss" in written


def test_mlflow_gets_settings_numbers_and_files(tracked, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more than mlflow-skinny
    run_dir = tracked("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("qlora").experiment_id])
    assert run.info.run_name == run_dir.name
    assert run.data.params["train.learning_rate"] == "0.01"
    for key in ("loss", "eval_loss"):
        logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)}
        assert logged == pytest.approx(numbers_of(run_dir, key))
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"report.html", "samples.jsonl"}


def test_trackio_gets_everything_offline(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    run_dir = tracked("trackio")
    assert capsys.readouterr().out == ""
    (run,) = trackio.Api().runs("qlora")
    assert run.name == run_dir.name
    assert run.config["train.learning_rate"] == 0.01
    lines = SQLiteStorage.get_logs("qlora", run.name, run_id=run.id)
    for key in ("loss", "eval_loss"):
        logged = {line["step"]: line[key] for line in lines if key in line}
        assert logged == pytest.approx(numbers_of(run_dir, key))
    tables = {line["step"]: line["samples"]["_value"] for line in lines if "samples" in line}
    written = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert tables == {line["step"]: [{"step": line["step"]} | row for row in line["samples"]] for line in written}
    files = {path.read_bytes() for path in (tmp_path / "trackio" / "artifacts").rglob("*") if path.is_file()}
    assert files >= {(run_dir / name).read_bytes() for name in ("report.html", "samples.jsonl")}


@pytest.mark.parametrize("message", ["no server at http://localhost:1.", "no server\n  at http://localhost:1"])
def test_a_tracker_that_does_not_start_is_reported_before_the_first_step(message, configure, monkeypatch):
    def refuse(*_):
        raise ConnectionError(message)

    monkeypatch.setattr(Processes, "start_trackers", refuse)
    config = configure(train__trackers=["tensorboard"])
    with pytest.raises(ConfigError, match=r"tensorboard did not start: no server at http://localhost:1\. Set it up"):
        Tracking(Processes(), config, "mine")


class Recorder:
    """A tracker that keeps what it gets, as accelerate's do."""

    def __init__(self, name):
        self.name, self.files = name, []
        self.tracker = self

    def save(self, path, base_path, policy):
        self.files.append(path)

    def log_artifact(self, path, type="artifact"):
        self.files.append(path)


def test_files_go_to_the_trackers_that_keep_them(tmp_path, monkeypatch):
    page, absent = tmp_path / "report.html", Path("samples.jsonl")
    page.write_text("page")
    trackers = [Recorder(name) for name in ("wandb", "mlflow", "tensorboard", "trackio")]
    monkeypatch.setattr(Processes, "trackers", trackers)
    assert send_files(Processes(), [page, absent]) == []
    assert [tracker.files for tracker in trackers] == [[str(page)], [str(page)], [], [page]]


def test_a_tracker_that_fails_is_named_and_the_others_get_their_files(tmp_path, monkeypatch):
    def refuse(path):
        raise ConnectionError("no network")

    page = tmp_path / "report.html"
    page.write_text("page")
    trackers = [Recorder("mlflow"), Recorder("wandb")]
    trackers[0].log_artifact = refuse
    monkeypatch.setattr(Processes, "trackers", trackers)
    assert send_files(Processes(), [page]) == ["mlflow did not get the run's files (report.html): no network"]
    assert trackers[1].files == [str(page)]
