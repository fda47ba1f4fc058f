"""The run page in a browser: its script runs, draws every chart, and is used by keys alone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora.checkpoint import RunDirectory, record_release
from qlora.pages import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, which draws the page")

# Added to the page, and run once it is built: what it shows is left in the title.
PROBE = """
const all = (selector) => [...document.querySelectorAll(selector)];
const plot = all(".plot")[0], press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", {key}));
const values = () => all(".chart output").map((value) => value.textContent).join(" ");
const seen = {
  charts: all(".chart canvas").length, last: values(), width: document.body.scrollWidth,
  unreachable: all("button, a, input, summary, .plot, .scroll").filter((each) => each.tabIndex < 0).length,
  lost: all("section").filter((each) => each.textContent.includes("This can't be shown")).map((each) => each.id),
  scripts: all("script").length, images: all("img").length, headings: all("h2").map((each) => each.textContent),
};
press("l");
press("ArrowRight");
setTimeout(() => {
  seen.first = values();
  seen.isLog = all(".chart button")[0].getAttribute("aria-pressed");
  document.title = JSON.stringify(seen);
}, 100);
"""


def look(page, profile, width=1400):
    """Return what the probe saw on a page."""
    source = page.read_text(encoding="utf-8")
    source = re.sub(r"<meta http-equiv=.*?>", "", source).replace("</body>", f"<script>{PROBE}</script></body>")
    page.write_text(source, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])


def test_a_page_is_drawn_and_its_charts_are_used_by_keys(make_run, tmp_path):
    folder = make_run()
    seen = look(Path(report(folder).page), tmp_path / "profile", width=500)
    assert seen["charts"] == 6
    assert seen["width"] <= 500
    assert seen["unreachable"] == 0
    assert {"Curves", "Settings", "Data", "Memory", "Reproduce"} <= {*seen["headings"]}
    assert seen["last"].startswith("5.3301 ")
    assert seen["first"] != seen["last"]
    assert seen["first"].startswith("5.9736 ")
    assert " 0.98469 " in seen["first"]  # the other charts follow
    assert seen["isLog"] == "true"


def test_hostile_text_adds_no_element(make_run, tmp_path):
    found = []
    for name, text in {"plain": "x", "bad": "</script><script>document.title='hit'</script><img src=x>"}.items():
        folder = make_run(name, [{"step": 1, "loss": 1.0}, {"step": 1, "skipped": text}])
        seen = look(Path(report(folder).page), tmp_path / f"profile-{name}")
        found.append((seen["scripts"], seen["images"], seen["headings"]))
    assert found[0] == found[1]


def test_a_value_that_can_not_be_shown_costs_one_section(make_run, tmp_path):
    folder = make_run()
    record_release(RunDirectory(folder), "merge", {"num_bytes": None, "losses": {"original": None}})
    page = Path(report(folder).page)
    source = page.read_text(encoding="utf-8")
    page.write_text(source.replace('"memory":{', '"memory":null,"unused":{', 1), encoding="utf-8")
    seen = look(page, tmp_path / "profile")
    assert seen["charts"] == 6
    assert {"Curves", "Settings", "Memory", "Releases", "Reproduce"} <= {*seen["headings"]}
    assert seen["lost"] == ["memory"]
