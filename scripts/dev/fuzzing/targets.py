"""Targets: every reader of untrusted files, with how its inputs are made."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import yaml

from qlora.checkpoint import RunDirectory, load_state, read_adapter, read_adapter_config
from qlora.config import load_config
from qlora.data.formats import FORMATS, RowReader
from qlora.data.rows import Row, read_rows
from qlora.data.sources import Source
from qlora.data.tables import HeaderRule
from qlora.data.template import render
from qlora.errors import QLoRAError
from qlora.files import BaseFiles
from qlora.model import BaseWeights, build_skeleton, load_generation_config, load_tokenizer
from qlora.training.progress import Progress
from scripts.dev.fuzzing.altering import altered_bytes, altered_value, contents, write_files
from scripts.dev.fuzzing.samples import CALLS, CONFIG, ROWS, TEMPLATE, TURNS, Samples

ENCODINGS, KINDS = (
    ["utf-8", "latin-1", "utf-16", "utf-7", "idna", "cp037", "x"],
    ["auto", "lines", "text", "csv", "json"],
)
KEYS = ["lora.rank", "model.base", "data.train", "train.betas", "lora", "x.y", "data.train.path", "", "a=b", "."]
YAML_VALUES = [
    "1", "[1, 2]", "{a: *b}", "!!python/name:os.system", "9" * 5000, "2024-99-99", "", "[" * 999, "\0", "~", "&a [*a]",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader under attack.

    Attributes:
        write: Makes an input from files in a folder or from values.
        read: Reads it.
        share: Weight of the target in the number of inputs.
    """

    write: Callable[[Random, Path], Any]
    read: Callable[[Any], object]
    share: float = 1.0


def make_targets(samples: Samples) -> dict[str, Target]:
    """Return every reader, by name."""

    def config(rng: Random, folder: Path) -> Any:
        content = as_yaml(rng, altered_value(rng, CONFIG))
        (folder / "config.yaml").write_bytes(altered_bytes(rng, content) if rng.random() < 0.2 else content)
        overrides = [f"{rng.choice(KEYS)}={rng.choice(YAML_VALUES)}" for _ in range(rng.randrange(3))]
        return folder / "config.yaml", overrides

    def rows(rng: Random, folder: Path) -> Source:
        name = rng.choice(sorted(samples.rows))
        write_files(rng, folder, {name: samples.rows[name]})
        kind, encoding = (rng.choice(each) if rng.random() < 0.3 else each[0] for each in (KINDS, ENCODINGS))
        return Source(str(folder / name), type=kind, encoding=encoding)

    def checkpoint(rng: Random, folder: Path) -> Path:
        write_files(rng, folder, samples.checkpoint)
        if rng.random() < 0.7:  # with hashes made to match
            files = {name: content for name, content in contents(folder).items() if name != "manifest.json"}
            entries = {
                name: {"bytes": len(content), "sha256": sha256(content).hexdigest()} for name, content in files.items()
            }
            (folder / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
        return folder

    def template(rng: Random, _: Path) -> Any:
        text = altered_bytes(rng, TEMPLATE.encode()).decode("utf-8", "replace") if rng.random() < 0.7 else TEMPLATE
        return text, altered_value(rng, TURNS), altered_value(rng, CALLS) if rng.random() < 0.5 else None

    def render_it(given: Any) -> object:
        samples.tokenizer.chat_template, messages, tools = given
        return render(samples.tokenizer, messages, tools)

    def read_run(folder: Path) -> None:
        run = RunDirectory.open(folder)
        for read in (lambda: load_config(run.config), run.read_record, lambda: run.read_metrics(1), run.read_metrics):
            each_refused(read)

    def read_adapter_files(folder: Path) -> None:
        each_refused(lambda: read_adapter_config(folder))
        each_refused(lambda: read_adapter(folder))

    about, everything = samples.about, samples.base | samples.about
    adapter = {name: content for name, content in samples.checkpoint.items() if name.startswith("adapter")}
    weights = tuple(name for name in samples.base if name != "config.json")
    return {
        "config": Target(config, lambda given: load_config(*given), 2),
        "rows": Target(rows, lambda source: list(read_rows(source, HeaderRule("auto", (), "ab"))), 4),
        "formats": Target(
            lambda rng, _: (rng.choice(["auto", *FORMATS]), altered_value(rng, rng.choice(ROWS))),
            lambda given: RowReader(given[0]).read(Row(given[1] if isinstance(given[1], dict) else {}, "x:1")),
            4,
        ),
        "adapter": Target(lambda rng, folder: write_files(rng, folder, adapter), read_adapter_files, 2),
        "checkpoint": Target(
            checkpoint,
            lambda folder: Progress.restored(load_state(folder, samples.model, samples.optimizer)),
            2,
        ),
        "run": Target(lambda rng, folder: write_files(rng, folder, samples.run), read_run, 2),
        "base": Target(
            lambda rng, folder: write_files(rng, folder, samples.base),
            lambda path: BaseWeights(BaseFiles.resolve(str(path))).lazy(),
            2,
        ),
        "architecture": Target(
            lambda rng, folder: write_files(rng, folder, everything, (*about, *weights)),
            lambda path: build_skeleton(BaseFiles.resolve(str(path))),
            0.3,
        ),
        "generation": Target(
            lambda rng, folder: write_files(rng, folder, {name: about[name] for name in about if "generation" in name}),
            load_generation_config,
            0.3,
        ),
        "tokenizer": Target(
            lambda rng, folder: write_files(rng, folder, everything, tuple(samples.base)), load_tokenizer, 0.3
        ),
        "template": Target(template, render_it, 2),
    }


def as_yaml(rng: Random, value: Any) -> bytes:
    """Return values as YAML, of which JSON is a subset."""
    return (json.dumps(value) if rng.random() < 0.5 else yaml.safe_dump(value)).encode("utf-8", "surrogatepass")


def each_refused(read: Callable[[], object]) -> None:
    """Read, and ignore a QLoRAError."""
    with suppress(QLoRAError):
        read()
