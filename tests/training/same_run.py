"""Helpers that compare two runs, and that damage or alter checkpoints."""

import hashlib
import json

from safetensors.torch import load_file

from qlora.training.metrics import VOLATILE


def lines_of(folder):
    """Return the logged lines without volatile values."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


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


def rewrite(checkpoint, name, **values):
    """Change one of a checkpoint's files and its manifest, as anyone with write access can."""
    path, manifest = checkpoint / name, checkpoint / "manifest.json"
    content = json.dumps(json.loads(path.read_text()) | values).encode()
    path.write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {name: entry}))
