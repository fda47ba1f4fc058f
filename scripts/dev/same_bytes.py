"""Check that two versions of qlora train and merge the same bytes, by everything that a few short runs write.

    git worktree add /tmp/before COMMIT
    python -m scripts.dev.same_bytes /tmp/before .

Runs the tiny config, a packed and a padded run that are stopped and continued, merges each onto both bases, and writes
GGUF; then compares adapters, optimizer states, logged losses and merged files by their hashes. Exits with 1 if a hash
differs. Both versions run one after the other, in the Python that runs this script.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Runs in a version's own tree, with names that every version has.
CASES = """
import json, subprocess, sys
from pathlib import Path

import yaml

from qlora.config import load_config
from qlora.export import merge
from qlora.training import train

tiny, out, made = yaml.safe_load(open("configs/tiny.yaml")), Path(sys.argv[1]), Path(sys.argv[2])
data = {"train": str(made / "data" / "train.jsonl"), "eval": str(made / "data" / "heldout.jsonl")}
cases = {
    "tiny": ({}, None),
    "packed": ({"lora": {"rslora": True, "form": "folded"}, "train": {"max_steps": 8, "save_every": 3}}, 4),
    "padded": (
        {
            "lora": {"dropout": 0.1, "rank": 4},
            "data": {"packing": False},
            "train": {"max_steps": 8, "save_every": 3, "optimizer": "adamw_32bit", "rounding": "master"},
            "model": {"recompute": "full"},
        },
        5,
    ),
}
for name, (changes, stop_at) in cases.items():
    config = {section: dict(keys) for section, keys in tiny.items()}
    for section, keys in changes.items():
        config[section].update(keys)
    config["model"]["base"] = str(made / "base")
    config["data"] |= data | {"cache_dir": str(out / "cache")}
    config["train"]["output_dir"] = str(out / name)
    path = out / f"{name}.yaml"
    path.write_text(json.dumps(config))
    if stop_at:
        train(load_config(path), stop_at=stop_at)
    train(load_config(path))
    for onto in ("dequantized", "original"):
        merge(out / name, out / f"{name}-{onto}", onto=onto)
    gguf = ["-o", str(out / f"{name}-gguf"), "--format", "gguf", "--dtype", "float16"]
    subprocess.run([sys.executable, "-m", "qlora", "merge", str(out / name), *gguf], check=True)
"""
# Logged values that depend on time or memory, and are not compared.
VOLATILE = ("tokens_per_second", "peak_memory")
SUFFIXES = (".safetensors", ".gguf")


def leave(tree: Path, made: Path, out: Path) -> dict[str, str]:
    """Train and merge with the qlora of a tree; return the hashes of what it wrote, by file."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", CASES, str(out), str(made)], check=True, cwd=tree, env=environment)
    hashes = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    }
    for path in sorted(out.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]
        hashes[str(path.relative_to(out))] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return hashes


def main() -> None:
    """Compare the versions in two trees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="tree with the first version")
    parser.add_argument("after", type=Path, help="tree with the second version")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = arguments.after.resolve() / ".cache" / "tiny"  # where the quickstart keeps them too
        for script, out in (("make_base", "base"), ("make_instructions", "data")):
            command = [sys.executable, f"scripts/tiny/{script}.py", "--out", str(made / out)]
            subprocess.run(command, check=True, cwd=arguments.after.resolve())
        found = []
        for tree in (arguments.before.resolve(), arguments.after.resolve()):
            out = Path(folder) / "run"  # the same for both: files name their folder
            out.mkdir()
            found.append(leave(tree, made, out))
            out.rename(Path(folder) / f"run-{len(found)}")
    before, after = found
    differing = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(before)} files before, {len(after)} after, {len(differing)} differ")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
