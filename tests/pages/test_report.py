"""`qlora report`: one run, several, and folders of runs."""

import json
import os
import shutil
from pathlib import Path

import pytest

import qlora
from qlora.errors import CheckpointError
from qlora.files import hold_lock
from tests.cli import run


def test_one_run_is_summarized_and_has_its_page(make_run):
    folder = make_run()
    done = run("report", folder, "--json").json()
    (summary,) = done["runs"]
    assert done["page"] == str(folder / "report.html")
    assert (folder / "report.html").is_file()
    assert (summary["status"], summary["step"], summary["total_steps"], summary["rank"]) == ("finished", 4, 4, 4)
    assert (summary["best_step"], summary["learning_rate"]) == (4, 0.01)
    assert summary["best_loss"] == pytest.approx(5.48768933614095)
    seconds = 437 / 5620.3 + 203 / 5737.5 + 457 / 4438.2 + 183 / 1117.7
    assert summary["seconds"] == pytest.approx(seconds)
    assert summary["size"] > 10_000


def test_a_checkpoint_stands_for_its_run(make_run):
    folder = make_run()
    checkpoint = folder / "checkpoints" / "step-000004"
    assert run("report", checkpoint, "--json").json()["runs"][0]["run"] == str(folder)


def test_a_folder_of_runs_is_a_table(make_run, tmp_path):
    make_run("one")
    make_run("group/two", kind="interrupted")
    done = run("report", tmp_path / "runs")
    assert done.code == 0
    head, first, second, hint = done.out.splitlines()
    assert head.split()[:2] == ["run", "status"]
    assert first.split()[1:3] == ["interrupted", "2/4"]
    assert second.split()[1:3] == ["finished", "4/4"]
    assert "-o FILE" in hint
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in (first, second)}) == 1
    assert not list((tmp_path / "runs").rglob("report.html"))


def test_a_folder_of_runs_is_compared_on_a_page(make_run, tmp_path):
    make_run("one")
    make_run("two")
    done = run("report", tmp_path / "runs", "-o", tmp_path / "all.html", "--json").json()
    assert [each["run"] for each in done["runs"]] == [str(tmp_path / "runs" / name) for name in ("one", "two")]
    assert (tmp_path / "all.html").is_file()


def test_a_damaged_run_is_named_and_hides_no_other(make_run, tmp_path):
    broken = make_run("broken")
    (broken / "run.json").write_text("{")
    make_run("good")
    done = run("report", tmp_path / "runs")
    assert done.code == 0
    assert "good" in done.out
    assert f"{broken} can't be read: " in done.out
    assert "run.json is damaged" in run("report", broken).error()


def test_what_can_not_be_reported_is_an_error(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    message = f"There is no run in {tmp_path / 'empty'}; name runs, or folders with runs in them."
    assert run("report", tmp_path / "empty").error() == message
    folder = make_run()
    absent = tmp_path / "absent"
    expected = f"There is no run in {tmp_path / 'empty'}, {absent};"
    assert expected in run("report", folder, tmp_path / "empty", absent).error()
    assert "can't be written" in run("report", folder, "-o", tmp_path / "empty").error()
    record = json.loads((folder / "run.json").read_text())
    record["data"][0]["tokens"] = "many"
    (folder / "run.json").write_text(json.dumps(record))
    assert "invalid value of data" in run("report", folder).error()


def test_a_run_that_is_named_twice_is_listed_once(make_run, tmp_path):
    folder = make_run("one")
    again = tmp_path / "runs" / ".." / "runs"
    assert [each.run for each in qlora.report([folder, again, folder / "adapter"]).runs] == [str(folder)]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 5, "skipped": "x", "rows": [1]}',
        '{"step": 5, "loss": 1.0, "epoch": "x"}',
        '{"step": 5, "loss": 1' + "0" * 400 + "}",
        '{"step": 5, "samples": [3]}',
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_run(line, make_run, tmp_path):
    broken = make_run("broken")
    make_run("good")
    with (broken / ("samples.jsonl" if "samples" in line else "metrics.jsonl")).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match="broken has a damaged file"):
        qlora.report(broken)
    result = qlora.report(tmp_path / "runs", tmp_path / "all.html")
    assert [each.run for each in result.runs] == [str(tmp_path / "runs" / "good")]
    assert list(result.damaged) == [str(broken)]


def test_a_run_is_running_only_while_a_process_holds_it(make_run):
    folder = make_run()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (folder / "run.lock").write_text("left by a killed process")
    assert qlora.report(folder).runs[0].status == "interrupted"
    with hold_lock(folder / "run.lock"):
        assert qlora.report(folder).runs[0].status == "running"


def test_a_folder_that_disappears_while_it_is_measured_is_passed_over(make_run, monkeypatch):
    folder = make_run()
    checkpoint, walk = folder / "checkpoints" / "step-000004", os.walk

    def walk_as_it_goes(top):
        for parent, folders, names in walk(top):
            if Path(parent) == checkpoint.parent:
                shutil.rmtree(checkpoint)
            yield parent, folders, names

    monkeypatch.setattr("qlora.pages.summary.os.walk", walk_as_it_goes)
    assert qlora.report(folder).runs[0].size > 0
    assert not checkpoint.exists()


def test_it_is_a_function_too(make_run):
    result = qlora.report(make_run())
    assert repr(result) == f"<RunsReport: 1 runs, {result.page}>"
