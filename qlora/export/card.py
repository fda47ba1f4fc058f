"""The model card of a release: how it was made, without paths of this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora.checkpoint import RunDirectory, RunRecord, evaluation_metrics, metric_label, read_adapter_config
from qlora.config import RunConfig, TrainSection, load_config
from qlora.config.plain_yaml import parse_yaml
from qlora.export.card_adapter import adapter_rows
from qlora.export.card_objective import objective_rows, unit_of
from qlora.lora import ScoreHead
from qlora.model import AdapterSource

CARD_FILE = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
LICENSE_KEYS = ("license", "license_name", "license_link")
# First words of a licence's text, and the hub's name for it.
LICENSES = {
    "MIT License": "mit",
    "The MIT License": "mit",
    "Apache License": "apache-2.0",
    "BSD 3-Clause License": "bsd-3-clause",
    "BSD 2-Clause License": "bsd-2-clause",
    "Mozilla Public License Version 2.0": "mpl-2.0",
}
LOST_IN_4_BITS = (
    "don't quantize these weights to 4 bits again: every weight sits on a code centre of the first quantization, so "
    "nearly all of the fine-tuning gain is lost at gentle learning rates; for that, merge --onto original"
)
PIPE = r"\|"  # in a table's cell, even inside code
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz")


def write_card(folder: Path, name: str, run: RunDirectory, base_folder: Path, report: Mapping[str, Any]) -> None:
    """Write a release's README.md.

    A base or a data file given by its path appears only with the last part of the path.

    Args:
        folder: Folder of the release.
        name: Name of the release.
        run: Run that was merged.
        base_folder: Folder with the base's files, for its licence.
        report: Values of the merge report.
    """
    record, config = run.read_record(), load_config(run.config)
    base, base_on_hub = public_name(record.base.name)
    license = read_license(base_folder)
    front: dict[str, Any] = {key: value for key, value in license.items() if value}
    if base_on_hub:
        front |= {"base_model": base, "base_model_relation": "finetune"}
    datasets = [source for source, on_hub in map(public_name, _sources(config)) if on_hub]
    if datasets:
        front["datasets"] = datasets
    front |= {"library_name": _library(folder), "pipeline_tag": _pipeline(record.head), "tags": ["qlora", "lora"]}
    unit, size = unit_of(config.train.objective)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {name}",
        f"{_link(base, base_on_hub)}, fine-tuned with QLoRA, with the adapter merged into its weights."
        + _describe_head(record.head),
        "## Data",
        _table(["source", "format", unit, "tokens", "supervised tokens"], _data_rows(record, size)),
        f"{record.examples.train // size} {unit} for training, {record.examples.eval // size} held out"
        f"{_other_sets(record, size)}.",
        "## Training",
        _table(["setting", ""], _settings(run, record, config).items()),
        "## Evaluation",
        _table(["step", ""], _evaluations(run)),
        "## Merge",
        _table(["", ""], _merge_rows(report).items()),
        "## Licence",
        _license_text(base, license),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_quantized_card(
    folder: Path,
    name: str,
    base: str,
    base_folder: Path,
    rows: Mapping[str, Any],
    head: ScoreHead | None = None,
) -> None:
    """Write the README.md of a model in 4 bits.

    Args:
        folder: Folder of the model in 4 bits.
        name: Name of the model.
        base: Folder or hub id of the original model; a folder appears only with the last part of its path.
        base_folder: Folder with the original model's files, for its licence.
        rows: Rows of the card's table: values by name.
        head: Head of scores of the model, if it has one.
    """
    base, is_on_hub = public_name(base)
    license = read_license(base_folder)
    front: dict[str, Any] = dict(license)
    if is_on_hub:
        front |= {"base_model": base, "base_model_relation": "quantized"}
    front |= {"library_name": "transformers", "pipeline_tag": _pipeline(head), "tags": ["bitsandbytes", "nf4"]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {name}",
        f"{_link(base, is_on_hub)} in bitsandbytes' 4-bit format, which transformers loads directly."
        + _describe_head(head),
        _table(["", ""], rows.items()),
        "## Licence",
        _license_text(base, license),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_adapter_card(
    folder: Path, name: str, source: AdapterSource, base_folder: Path, report: Mapping[str, Any]
) -> None:
    """Write the README.md of a release whose adapter was made elsewhere, so that its training is not known.

    Args:
        folder: Folder of the release.
        name: Name of the release.
        source: The adapter and its base.
        base_folder: Folder with the base's files, for its licence.
        report: Values of the merge report.
    """
    base, base_on_hub = public_name(source.base)
    license, config = read_license(base_folder), read_adapter_config(source.folder)
    front: dict[str, Any] = dict(license)
    if base_on_hub:
        front |= {"base_model": base, "base_model_relation": "finetune"}
    front |= {"library_name": _library(folder), "pipeline_tag": _pipeline(source.head), "tags": ["lora"]}
    patterns = {"ranks": config.get("rank_pattern"), "alphas": config.get("alpha_pattern")}
    own = "".join(f"; {what} by layer: {pattern}" for what, pattern in patterns.items() if pattern)
    adapter = {
        "adapter": f"rank {config['r']}, alpha {config['lora_alpha']:g}, rsLoRA: {bool(config.get('use_rslora'))}{own}",
        "trained in full": ", ".join(map(str, config.get("modules_to_save") or [])),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {name}",
        f"{_link(base, base_on_hub)} with the LoRA adapter {source.folder.name} merged into its weights. The adapter "
        "was made elsewhere, so its data and training are not known here." + _describe_head(source.head),
        "## Merge",
        _table(["", ""], ({key: value for key, value in adapter.items() if value} | _merge_rows(report)).items()),
        "## Licence",
        _license_text(base, license),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _pipeline(head: ScoreHead | None) -> str:
    """Return the hub's name of what a model is for."""
    return "text-generation" if head is None else head.pipeline


def _describe_head(head: ScoreHead | None) -> str:
    """Return sentences about a head of scores; empty for a model that predicts tokens."""
    if head is None:
        return ""
    if head.num_labels == 1 and not head.labels:
        what = "It is a reward model: it gives a text one score"
    else:
        what = f"It classifies {head.documents}: {', '.join(head.labels) or f'{head.num_labels} labels'}"
    return f" {what}, and loads with {head.auto_class}."


def lost_in_4_bits(onto: str) -> list[str]:
    """Return a warning against quantizing merged weights to 4 bits again; empty if they were merged onto the original.

    Args:
        onto: Base weights that were merged onto.
    """
    return [LOST_IN_4_BITS] if onto == "dequantized" else []


def public_name(source: str) -> tuple[str, bool]:
    """Return a source's name without this machine's folders, and whether it is a hub id."""
    name = source.rpartition(":")[0] if HUB_ID.fullmatch(source.rpartition(":")[0]) else source
    is_path = Path(name).expanduser().exists() or name.endswith(FILE_SUFFIXES)
    if HUB_ID.fullmatch(name) and not is_path:
        return name, True
    return Path(name).expanduser().resolve().name, False


def read_license(base_folder: Path) -> dict[str, str]:
    """Return a model's licence under the hub's keys: from its card, or else from its licence file; empty if unknown."""
    card = base_folder / CARD_FILE
    match = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    try:
        front = parse_yaml(match[1]) if match else {}
    except ValueError:
        front = {}
    if isinstance(front, dict) and isinstance(front.get("license"), str):
        return {key: front[key] for key in LICENSE_KEYS if isinstance(front.get(key), str)}
    for path in sorted(filter(Path.is_file, base_folder.glob("LICENSE*"))):
        start = " ".join(path.read_text(encoding="utf-8", errors="replace")[:200].split())
        known = next((name for text, name in LICENSES.items() if start.startswith(text)), None)
        if known:
            return {"license": known}
        return {"license": "other", "license_name": "of-the-base", "license_link": path.name}
    return {}


def _license_text(base: str, license: Mapping[str, str]) -> str:
    if not license:
        return f"{base} states no licence; ask its authors."
    return f"That of {base}: {license.get('license_name', license['license'])}. The data may have further terms."


def _sources(config: RunConfig) -> list[str]:
    return [source.path for source in config.data.train]


def _data_rows(record: RunRecord, size: int) -> list[tuple[Any, ...]]:
    return [
        (
            _link(*public_name(report["source"]), "datasets/"),
            report["format"],
            report["examples"] // size,
            report["tokens"],
            report["supervised_tokens"],
        )
        for report in record.data
    ]


def _other_sets(record: RunRecord, size: int) -> str:
    """Return what the card says about sets that are evaluated besides the held-out rows; empty if there are none."""
    others = [
        f", {count // size} as {name}" for name, count in record.held_out.items() if name not in ("eval", "retain")
    ]
    count = sum(report["examples"] for report in record.retain) // size
    names = ", ".join(public_name(report["source"])[0] for report in record.retain)
    retained = f", {count} of an older task ({names}) only to measure what is retained" if record.retain else ""
    return "".join([*others, retained])


def _settings(run: RunDirectory, record: RunRecord, config: RunConfig) -> dict[str, Any]:
    lora, train, data = config.lora, config.train, config.data
    quantization, in_use = record.quantization, record.in_use
    sequences = f"{train.micro_batch_size} × {train.gradient_accumulation_steps} × {in_use.processes}"
    size = unit_of(train.objective)[1]
    longest = data.max_seq_len if size == 1 else f"{size} × {data.max_seq_len}"
    packed = "" if in_use.packing_fill is None else ", packed"
    rows_of = f"{sequences} of up to {longest} tokens{packed}"
    rate = in_use.learning_rate or train.peak
    mean_ranks = [line["mean_rank"] for line in run.read_metrics(until=run.step) if "mean_rank" in line]
    start = None if lora.start_from is None else public_name(lora.start_from)[0]
    old_task = None if train.keep is None or train.keep.null_space is None else public_name(train.keep.null_space)[0]
    return {
        "steps": run.step,
        **({"images per step": sequences} if data.has_images else {"sequences per step": rows_of}),
        "base in training": f"{quantization.kind}, double quantization: {quantization.double_quant}",
        **adapter_rows(lora, train.keep, mean_ranks[-1] if mean_ranks else None, start, old_task),
        **_rows_trained(record, config),
        **objective_rows(config),
        "optimizer": f"{train.optimizer}, learning rate {rate:g} ({_schedule(train)}), weight decay "
        f"{train.weight_decay:g}, gradients "
        f"{'not clipped' if train.max_grad_norm is None else f'clipped at {train.max_grad_norm:g}'}",
        "compute dtype": in_use.compute_dtype,
        "seed": train.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }


def _schedule(train: TrainSection) -> str:
    options = {"decay_ratio": train.decay_ratio, "restarts": train.restarts}
    parts = [f"{key} {value:g}" for key, value in options.items() if value is not None]
    if train.min_learning_rate:
        parts.append(f"down to {train.min_learning_rate:g}")
    warmup = f"{train.warmup_ratio:g}" if train.warmup_steps is None else f"{train.warmup_steps} steps"
    rates = [
        f"{group} {rate if isinstance(rate, str) else f'{rate:g}'}" for group, rate in train.learning_rates.items()
    ]
    return ", ".join([train.lr_scheduler, *parts, f"warmup {warmup}", *rates])


def _rows_trained(record: RunRecord, config: RunConfig) -> dict[str, str]:
    """Return the card's lines on rows of embedding and head trained in full; empty if there are none."""
    rows = record.parameters.trained_rows
    lines = {"rows trained in full": ", ".join(f"{stop - start} of {name}" for name, (start, stop) in rows.items())}
    lines["new tokens"] = " ".join(f"`{token}`" for token in config.data.new_tokens)
    return {key: value for key, value in lines.items() if value}


def _evaluations(run: RunDirectory) -> list[tuple[Any, ...]]:
    """Return the held-out losses, the evaluations' other metrics before and after, and the last training loss."""
    lines = run.read_metrics(until=run.step)
    rows = []
    for name, values in evaluation_metrics(lines).items():
        shown = list(values.items())
        shown = shown if name == "eval_loss" else shown[:1] + shown[1:][-1:]
        rows += [(step, f"{value:.4f} {metric_label(name)}") for step, value in shown]
    return rows + [(line["step"], f"{line['loss']:.4f} training loss") for line in lines if "loss" in line][-1:]


def _merge_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    rows = {
        "weights": report["dtype"],
        "merged into": f"the {report['onto']} base" if report.get("onto") else None,
        "layers with an adapter": report.get("merged"),
        "tensors": report.get("tensors"),
        "bytes": report.get("num_bytes"),
        "loss by base": ", ".join(f"{base} {loss:.4f}" for base, loss in (report.get("losses") or {}).items()),
        "files that differ from the base used in training": ", ".join(report.get("base_differs") or []),
        "notes": "; ".join(dict.fromkeys([*(report.get("notes") or []), *lost_in_4_bits(report.get("onto", ""))])),
    }
    return {key: value for key, value in rows.items() if value not in (None, "")}


def _library(folder: Path) -> str:
    return "gguf" if any(folder.glob("*.gguf")) else "transformers"


def _link(name: str, on_hub: bool, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if on_hub else name


def _table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', PIPE) for cell in line)} |" for line in lines)
