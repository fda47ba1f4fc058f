"""The run page: it holds what the run's files say, hostile text stays text, and it needs no network."""

import json
import re
import tomllib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from qlora.checkpoint import RunDirectory, record_release
from qlora.data import Labels
from qlora.errors import CheckpointError
from qlora.pages import refresh_page, report
from qlora.pages.page import as_inert_json
from qlora.pages.samples import MOST_CHARACTERS, samples_by_prompt

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;\u2028\ud800\x00"


class Page(HTMLParser):
    """A page's elements, and the texts of its scripts and styles by tag and type."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.texts = [], [], {}
        self._inside = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self._inside = (tag, dict(attrs).get("type")) if tag in ("script", "style", "title") else None

    def handle_data(self, data):
        if self._inside is not None:
            self.texts.setdefault(self._inside, []).append(data)

    def handle_endtag(self, tag):
        self._inside = None

    @property
    def values(self):
        (text,) = self.texts["script", "application/json"]
        return json.loads(text)


def page_of(run, **arguments):
    return Page(Path(report(run, **arguments).page))


def test_the_page_holds_what_the_files_of_an_older_run_say(make_run):
    folder = make_run()
    page = page_of(folder)
    (run,) = page.values["runs"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss, *_ = [chart for chart in run["charts"] if chart["quantity"] == "loss"]
    assert [curve["source"] for curve in loss["curves"]] == ["training", "held-out"]
    assert loss["curves"][0]["steps"] == [1, 2, 3, 4]
    assert loss["curves"][0]["values"] == pytest.approx([line["loss"] for line in lines if "loss" in line], rel=1e-5)
    assert run["summary"]["status"] == "finished"
    changed = {setting["key"]: setting["value"] for setting in run["settings"] if not setting["is_default"]}
    assert changed["train.learning_rate"] == "0.01"
    assert "lora.dropout" not in changed
    assert [setting["is_default"] for setting in run["settings"]] == sorted(s["is_default"] for s in run["settings"])
    assert run["data"][0]["facts"][1] == ["rows read", 12, "integer"]
    assert run["memory"]["estimated"] == 899296
    assert run["command"].startswith("qlora train ")
    assert run["environment"]["qlora"] == "0.1.0"


def test_the_page_is_whole_without_a_network(make_run):
    page = page_of(make_run())
    assert page.addresses == []
    assert re.findall(r"url\(|@import", "".join(page.texts["style", None])) == []
    assert len(page.source.encode()) < 600_000
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.source)[1]
    assert policy.startswith("default-src 'none'")
    assert policy.count("sha256-") == len(page.texts["script", None])


def test_text_of_runs_is_inert(make_run):
    plain, folder = page_of(make_run("plain")), make_run("<b>&\"'")
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": 1.0, f"eval_{HOSTILE}": 1.0})
        + "\n"
        + json.dumps({"step": 1, "loss_spike": HOSTILE, "rows": {HOSTILE: [1, 2]}})
        + "\n"
    )
    record = json.loads((folder / "run.json").read_text())
    in_record = HOSTILE.replace("\ud800", "")  # which no run.json can hold
    record["data"][0] |= {"source": in_record, "notes": [in_record]}
    (folder / "run.json").write_text(json.dumps(record))
    record_release(RunDirectory(folder), "merge", {"out_dir": HOSTILE, "dtype": HOSTILE})
    page = page_of(folder)
    assert page.tags == plain.tags
    assert "".join(page.texts["title", None]) == "<b>&\"'"
    (run,) = page.values["runs"]
    shown = HOSTILE.replace("\ud800", "?")
    assert run["events"]["shown"][0]["message"] == shown
    assert run["data"][0]["source"] == in_record
    assert run["releases"][0]["out_dir"] == shown


def test_values_are_json_that_can_not_end_its_element():
    values = {"text": HOSTILE, "<key>": [1, 2.5, None, True, float("nan"), float("inf")]}
    text = as_inert_json(values)
    assert set("<>&\u2028") & {*text} == set()
    expected = {"text": HOSTILE.replace("\ud800", "?"), "<key>": [1, 2.5, None, True, None, None]}
    assert json.loads(text) == expected


def test_no_secret_is_on_the_page(make_run, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'quoted "secret" of a user')
    message = f'it failed with hf_{"a" * 34} and quoted "secret" of a user.'
    folder = make_run(lines=[{"step": 1, "skipped": message}])
    page = page_of(folder)
    assert page.values["runs"][0]["events"]["shown"][0]["message"] == "it failed with *** and ***."
    assert "of a user" not in page.source


def test_a_secret_is_removed_before_its_text_is_clipped():
    secret = f"hf_{'a' * 34}"
    sample = {"prompt": "p" * (MOST_CHARACTERS - 10) + f" {secret}", "answer": ""}
    (shown,) = samples_by_prompt([{"step": 0, "samples": [sample]}])["prompts"]
    assert "hf_" not in shown["prompt"]


def test_prompts_of_equal_text_keep_their_own_answers():
    def line(step):
        kinds = [("q", "A"), ("q", "B"), ("q", "B"), ("r", None)]
        return {
            "step": step,
            "samples": [
                {
                    "prompt": prompt,
                    "answer": f"{number} at {step}",
                    **({} if reference is None else {"reference": reference}),
                }
                for number, (prompt, reference) in enumerate(kinds)
            ],
        }

    found = samples_by_prompt([line(0), line(2)])
    assert [each["answers"] for each in found["prompts"]] == [[f"{n} at 0", f"{n} at 2"] for n in range(4)]
    assert [each["reference"] for each in found["prompts"]] == ["A", "B", "B", None]


def test_the_command_holds_in_any_folder(make_run, monkeypatch):
    folder = make_run()
    monkeypatch.chdir(folder)
    (run,) = page_of(".").values["runs"]
    assert (run["name"], run["summary"]["run"]) == ("run", str(folder))
    assert run["command"] == f"qlora train {folder}/config.yaml train.output_dir={folder}-again"


def test_several_runs_are_compared_by_what_differs(make_run, tmp_path):
    first, second = make_run("first"), make_run("second")
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("rank: 4", "rank: 8"))
    page = page_of([first, second], output=tmp_path / "both.html")
    assert [run["name"] for run in page.values["runs"]] == ["first", "second"]
    assert page.values["differing"] == {"lora.rank": ["4", "8"]}
    assert not (first / "report.html").exists()


def test_runs_of_one_name_are_shown_by_their_paths(make_run, tmp_path):
    folders = [make_run("first/run"), make_run("second/run"), make_run("third")]
    page = page_of(folders, output=tmp_path / "all.html")
    assert [run["name"] for run in page.values["runs"]] == [str(folders[0]), str(folders[1]), "third"]


def test_the_last_confusion_matrix_comes_with_its_labels(make_run):
    matrices = [[[2, 1], [0, 3]], [[3, 0], [1, 2]]]
    folder = make_run(lines=[{"step": step, "eval_confusion": matrix} for step, matrix in enumerate(matrices)])
    assert page_of(folder).values["runs"][0]["confusion"] is None
    labels = Labels(("a<b>", "b"), "head", None).as_dict()
    (folder / "labels.json").write_text(json.dumps(labels))
    expected = {"step": 1, "labels": ["a<b>", "b"], "counts": matrices[1]}
    assert page_of(folder).values["runs"][0]["confusion"] == expected
    (folder / "labels.json").write_text("{}")
    with pytest.raises(CheckpointError, match="labels.json is damaged"):
        report(folder)


def test_a_long_run_keeps_its_extremes_on_a_small_page(make_run):
    lines = [{"step": step, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4} for step in range(1, 20_001)]
    lines[12_345]["loss"] = 77.0
    page = page_of(make_run(lines=lines))
    loss = page.values["runs"][0]["charts"][0]["curves"][0]
    assert max(loss["values"]) == 77.0
    assert loss["steps"][loss["values"].index(77.0)] == 12_346
    assert len(loss["steps"]) <= 1_600
    assert len(page.source.encode()) < 600_000


@pytest.mark.parametrize("kind", ["finished", "interrupted"])
def test_a_run_without_any_line_has_a_page(make_run, kind):
    assert page_of(make_run(lines=[], kind=kind)).values["runs"][0]["charts"] == []


def test_a_page_that_can_not_be_written_is_a_message(make_run):
    folder = make_run()
    (folder / "report.html").mkdir()
    assert "report.html could not be written" in refresh_page(RunDirectory(folder))
    assert refresh_page(RunDirectory(folder / "absent")) is not None


def test_every_asset_is_in_the_package_with_its_licence():
    assets = files("qlora.pages") / "assets"
    assert "MIT" in (assets / "uplot" / "LICENSE").read_text()
    assert re.search(r"uPlot \d+\.\d+\.\d+", (assets / "uplot" / "README.md").read_text())


def test_the_wheel_takes_every_file_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["qlora"]
    assert {*wheel} == {"packages", "force-include"}  # nothing is left out
