"""Whether two runs left the same, and a checkpoint that is not whole."""

import json

from safetensors.torch import load_file

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


def damage(checkpoint):
    path = checkpoint / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
