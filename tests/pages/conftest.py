"""Runs to make pages of, without training."""

import json
import shutil
from pathlib import Path

import pytest

OLDER_RUNS = Path(__file__).parents[1] / "runs_of_0_1_0"


@pytest.fixture
def make_run(tmp_path):
    """Return a function that copies the run of four steps by qlora 0.1.0, with lines of metrics of your own."""

    def make(name="run", lines=None, kind="finished"):
        folder = Path(shutil.copytree(OLDER_RUNS / kind, tmp_path / "runs" / name))
        for path in (folder / "config.yaml", folder / "run.json"):
            path.write_text(path.read_text().replace("{folder}", str(OLDER_RUNS)))
        if lines is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make
