"""The page of a run: written while it trains, and again when it is released."""

import json
import math
import re

import pytest

from qlora.checkpoint import RunDirectory, read_releases
from qlora.config import load_config
from qlora.export import merge
from qlora.pages import refresh_page
from qlora.proof import verify
from qlora.training import train
from qlora.training.metrics import MetricsLog
from tests.tiny import run_config


@pytest.fixture
def config(tiny_base, alpaca_file, tmp_path):
    return load_config(run_config(tiny_base, alpaca_file, tmp_path / "run", train__eval_every=2))


@pytest.fixture
def written(monkeypatch):
    """Return the status of the run and its last step at every time that its page is written."""
    seen = []

    def write(run):
        seen.append((run.read_record().status, max(line["step"] for line in run.read_metrics())))
        return refresh_page(run)

    monkeypatch.setattr("qlora.training.live_page.refresh_page", write)
    monkeypatch.setattr("qlora.training.run.refresh_page", write)
    return seen


def test_it_is_written_at_every_evaluation_and_at_the_end(config, written, monkeypatch):
    monkeypatch.setattr("qlora.training.live_page.MOST_TIME", math.inf)
    result = train(config)
    assert written == [("running", 0), ("running", 2), ("running", 4), ("running", 6), ("finished", 6)]
    assert (result.run_dir / "report.html").is_file()


def test_evaluations_that_follow_closely_leave_it_as_it_is(config, written, monkeypatch):
    monkeypatch.setattr("qlora.training.live_page.MOST_TIME", 1e-6)
    train(config)
    assert written == [("running", 0), ("finished", 6)]


def test_a_page_that_can_not_be_written_ends_no_run(config, tmp_path):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    result = train(config)
    assert result.status == "finished"
    assert any("report.html could not be written" in note for note in result.notes)


def test_a_failed_run_shows_what_it_logged(config, tmp_path, monkeypatch):
    original = MetricsLog.log_step

    def log_step(self, progress, report):
        original(self, progress, report)
        if progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "log_step", log_step)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    page = (tmp_path / "run" / "report.html").read_text()
    (values,) = re.findall(r'<script type="application/json" id="values">(.*?)</script>', page, re.DOTALL)
    (summary,) = [run["summary"] for run in json.loads(values)["runs"]]
    assert summary["status"] == "interrupted"
    assert (
        summary["loss"]
        == [line["loss"] for line in RunDirectory(tmp_path / "run").read_metrics() if "loss" in line][-1]
    )


def test_releases_are_on_it(config, tmp_path):
    run = RunDirectory(train(config).run_dir)
    run.page.unlink()
    merge(run.path, tmp_path / "merged")
    verify(run.path, tmp_path / "merged")
    verify(run.path)
    merged, verified, alone = read_releases(run)
    assert (merged["kind"], merged["step"], merged["out_dir"]) == ("merge", 6, str(tmp_path / "merged"))
    assert (verified["kind"], verified["matches"], verified["out_dir"]) == ("verify", True, str(tmp_path / "merged"))
    assert (alone["kind"], alone["out_dir"]) == ("verify", None)
    assert str(tmp_path / "merged") in run.page.read_text()
