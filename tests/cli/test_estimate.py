"""`qlora estimate`: its report for people and programs, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import run
from tests.tiny import run_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
KINDS = ["weights", "adapters", "optimizer", "activations", "loss", "buffers", "context"]


@pytest.fixture
def config(tmp_path, tiny_base):
    return run_config(tiny_base, tmp_path / "none.jsonl", tmp_path / "run")


def test_the_report_adds_up(config):
    report = run("estimate", config, "--gpu", "24GB", "--json").json()
    assert report["free_bytes"] == 24 * 10**9
    assert report["level"] == "none"
    for level in report["levels"].values():
        assert list(level["bytes"]) == KINDS
        assert sum(level["bytes"].values()) == level["total"]
        assert level["fits"]
        assert level["largest_micro_batch"] > 0 < level["longest_context"]


def test_the_table_and_the_bar_show_it(config):
    shown = run("estimate", config, "--gpu", "1GiB").out
    for word in ["offload+tiled", *KINDS, "longest row", "W weights", "· free", "recompute none: it takes"]:
        assert word in shown


def test_a_run_that_does_not_fit_is_reported_and_fails(config):
    result = run("estimate", config, "--gpu", "300MB")
    assert result.code == 1
    assert "too much" in result.out
    assert "train.micro_batch_size" in result.out


def test_a_level_that_is_asked_for_is_the_one_shown(config):
    report = run("estimate", config, "model.recompute=full", "--gpu", "8GB", "--json").json()
    assert report["level"] == "full"


@pytest.mark.slow
def test_a_probe_measures_what_was_predicted(config):
    # In a separate process: buffers that other models left would be measured.
    command = [sys.executable, "-m", "qlora", "estimate", str(config), "--probe", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert report["probe"]["ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("size", "problem"), [("lots", "should be a size"), ("-3GB", "should be a size"), ("24", "or a GPU: 3060")]
)
def test_a_wrong_size_is_wrong_use(config, size, problem):
    result = run("estimate", config, f"--gpu={size}")
    assert result.code == 2
    assert problem in " ".join(result.err.replace("│", "").split())


def test_weights_elsewhere_are_compared_with_those_on_the_device(config):
    report = run("estimate", config, "model.weights=host", "--gpu", "4090", "--processes", "2", "--json").json()
    places = report["places"]
    assert list(places) == ["device", "sharded", "host"]
    assert (report["weights"], report["free_bytes"], report["processes"]) == ("host", 24 << 30, 2)
    assert report["levels"][places["host"]["level"]]["total"] == places["host"]["total"]
    assert places["device"]["host_bytes"] == places["device"]["copied_bytes"] == 0
    # Embedding and head are on the host with both.
    assert places["host"]["host_bytes"] > places["sharded"]["host_bytes"] > 0
    shown = run("estimate", config, "model.weights=host", "--gpu", "RTX 4090", "--processes", "2").out
    for word in ("weights host: set by model.weights", "hidden from tokens", "sharded", "data sheets"):
        assert word in shown


def test_a_split_needs_processes(config):
    result = run("estimate", config, "model.weights=sharded", "--gpu", "24GB")
    assert result.code == 2
    assert "launch several with torchrun" in " ".join(result.err.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_is_estimated_for_its_gpu(path, tiny_base, tiny_image_base, realdata):
    bases = {"tiny": tiny_base, "digits": tiny_image_base}
    base = bases.get(path.stem, realdata / "configs" / "executorch_llama3-8B-instruct")
    options = ["model.recompute=auto", "model.weights=auto", "lora.expert_rank=auto"]
    report = run("estimate", path, f"model.base={base}", *options, "--gpu", "96GB", "--json").json()
    levels = report["levels"]
    assert report["level"] == next(name for name, level in levels.items() if level["fits"])
    totals = [level["total"] for level in levels.values()]
    assert max(totals) == totals[0]
    assert min(totals) == totals[-1]
