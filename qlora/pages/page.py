"""The run page: one self-contained HTML file with the curves and facts of runs."""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from qlora.about import __version__
from qlora.checkpoint import RunDirectory
from qlora.errors import secrets_of_environment, without_secrets
from qlora.files import write_text
from qlora.pages.run import describe_run
from qlora.pages.settings import differing

ASSETS = files("qlora.pages") / "assets"
# Points of a curve: for one run, and at least for each of several.
MOST_POINTS, LEAST_POINTS = 1600, 300


def points_of_each(num_runs: int) -> int:
    """Return the number of points of a curve on a page of several runs."""
    return max(LEAST_POINTS, MOST_POINTS // max(1, num_runs))


def refresh_page(run: RunDirectory) -> str | None:
    """Write a run's own page again.

    Returns:
        Why it could not be written: the page never ends what it is about. None if it was.
    """
    try:
        write_text(run.page, render_page([describe_run(run, points_of_each(1))]))
    except Exception as problem:
        return f"{run.page} could not be written: {problem}"
    return None


def render_page(runs: Sequence[dict[str, Any]]) -> str:
    """Return the page of runs, without secrets; all text of the runs is data for the page's script, and inert.

    Args:
        runs: Values of :func:`qlora.pages.run.describe_run`.
    """
    from jinja2 import Environment

    settings = [{setting["key"]: setting["value"] for setting in run["settings"]} | run["environment"] for run in runs]
    # Runs in folders of the same name are shown by their paths.
    counts = Counter(run["name"] for run in runs)
    runs = [run | {"name": run["name"] if counts[run["name"]] == 1 else run["summary"]["run"]} for run in runs]
    values = {"runs": runs, "differing": differing(settings) if len(runs) > 1 else {}, "version": __version__}
    scripts = [_asset("uplot/uPlot.iife.min.js"), _asset("charts.js"), _asset("page.js")]
    template = Environment(autoescape=True).from_string(_asset("page.html.jinja"))
    return template.render(
        title=without_secrets(", ".join(str(run["name"]) for run in runs)),
        styles=[_asset("uplot/uPlot.min.css"), _asset("page.css")],
        scripts=scripts,
        hashes=[_source_hash(script) for script in scripts],
        values=as_inert_json(values),
    )


def as_inert_json(values: Any) -> str:
    """Return values as JSON that can't end the element it is in, without secrets and without numbers JSON lacks."""
    text = json.dumps(
        _clean(values, secrets_of_environment()),
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
        default=str,
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _clean(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        # Half a surrogate pair, which UTF-8 has no bytes for, is shown as a question mark.
        return without_secrets(value, secrets).encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_clean(str(key), secrets): _clean(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, secrets) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _source_hash(script: str) -> str:
    """Return a script's hash as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return ASSETS.joinpath(*name.split("/")).read_text(encoding="utf-8").strip()
