"""Everything that the page shows of one run, as JSON values."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from qlora.checkpoint import RunDirectory, RunRecord, metric_label, read_releases
from qlora.config import RunConfig, load_config
from qlora.config.reference import as_yaml
from qlora.data import DataReport
from qlora.errors import CheckpointError
from qlora.pages.confusion import last_confusion
from qlora.pages.curves import TRAINING, as_columns, curves_by_quantity, thinned, title_of
from qlora.pages.samples import samples_by_prompt
from qlora.pages.settings import list_settings
from qlora.pages.summary import RunSummary, summary_of

# Kinds of events in metrics.jsonl, with what the page calls them.
EVENTS = {"skipped": "skipped", "loss_spike": "loss spike", "out_of_memory": "out of memory"}
# Events, and rows of an event, that the page lists.
MOST_EVENTS, MOST_ROWS = 200, 12


def describe_run(run: RunDirectory, num_points: int) -> dict[str, Any]:
    """Read a run's files, and return what the page shows of it.

    Args:
        run: The run; of any version that can be read, and it may still be training.
        num_points: Number of points of a curve, about.

    Raises:
        QLoRAError: A file of the run is damaged.
    """
    config, record, lines = load_config(run.config), run.read_record(), run.read_metrics()
    summary = summary_of(run, config, record, lines)
    return {
        "name": run.path.resolve().name or str(run.path.resolve()),
        "summary": summary.as_dict(),
        "facts": _facts(config, record, lines, summary),
        "charts": _charts(config, record, lines, num_points),
        "events": _events(lines),
        "confusion": last_confusion(run, lines),
        "samples": samples_by_prompt(run.read_samples()),
        "settings": [setting.as_dict() for setting in list_settings(config)],
        "data": _data(run, record),
        "memory": asdict(record.in_use.memory) | {"level": record.in_use.recompute, "why": record.in_use.recompute_why},
        "in_use": _in_use(record),
        "releases": read_releases(run),
        "command": _command(run, record),
        "environment": _environment(record),
    }


def _facts(
    config: RunConfig, record: RunRecord, lines: Sequence[Mapping[str, Any]], summary: RunSummary
) -> list[list[Any]]:
    """Return the numbers at the top of the page: a label, a value and the unit that it is shown in."""
    epoch = max((line["epoch"] for line in lines if "epoch" in line), default=None)
    best = record.best
    facts: list[list[Any]] = [
        ["objective", config.train.objective, "text"],
        ["training loss", summary.loss, "number"],
        ["lowest held-out loss", summary.best_loss, "number"],
        *([] if best is None else [[f"best {metric_label(best.metric)}, kept", best.value, "number"]]),
        ["epochs", epoch, "number"],
        ["training time", summary.seconds, "seconds"],
        ["images per second" if config.data.has_images else "tokens per second", summary.tokens_per_second, "integer"],
        ["peak memory", summary.peak_memory, "bytes"],
        ["base parameters", record.parameters.num_parameters, "integer"],
        ["trained parameters", record.parameters.num_trained, "integer"],
        ["peak learning rate", summary.learning_rate, "number"],
        ["rank", summary.rank, "integer"],
        ["size on disk", summary.size, "bytes"],
    ]
    return [fact for fact in facts if fact[1] is not None]


def _charts(
    config: RunConfig, record: RunRecord, lines: Sequence[Mapping[str, Any]], num_points: int
) -> list[dict[str, Any]]:
    titles = {"tokens_per_second": "Images per second"} if config.data.has_images else {}
    return [
        {
            "quantity": quantity,
            "title": titles.get(quantity) or title_of(quantity),
            "curves": [
                {
                    "source": _source_label(curve.source),
                    "is_training": curve.source == TRAINING,
                    "is_smoothed": curve.is_smoothed,
                    **as_columns(thinned(curve.points, num_points // 4 if curve.is_smoothed else num_points)),
                }
                for curve in curves
            ],
        }
        for quantity, curves in curves_by_quantity(lines, record.held_out).items()
    ]


def _source_label(source: str) -> str:
    names = {TRAINING: "training", "eval": "held-out", "retain": "retained"}
    return names.get(source) or source.removeprefix("eval_")


def _events(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [
        {
            "step": line["step"],
            "kind": name,
            "message": str(line[key]),
            "rows": {
                str(source): {"shown": rows[:MOST_ROWS], "count": len(rows)}
                for source, rows in (line.get("rows") or {}).items()
            },
        }
        for line in lines
        for key, name in EVENTS.items()
        if key in line
    ]
    return {"count": len(found), "shown": found[:MOST_EVENTS]}


def _data(run: RunDirectory, record: RunRecord) -> list[dict[str, Any]]:
    known = {field.name for field in fields(DataReport)}
    found = []
    for values in [*record.data, *record.retain]:
        report = DataReport(**{key: value for key, value in values.items() if key in known})
        try:
            found.append(
                {
                    "source": report.source,
                    "facts": _data_facts(report),
                    "template": report.chat_template,
                    "remarks": [*report.remarks(), *report.problem_lines()],
                    "lengths": report.lengths,
                    "bars": report.bars(),
                }
            )
        except (TypeError, ValueError, KeyError, AttributeError) as problem:
            raise CheckpointError(f"{run.record}: invalid value of data ({problem}).") from None
    return found


def _data_facts(report: DataReport) -> list[list[Any]]:
    facts: list[list[Any]] = [
        ["format", report.format, "text"],
        ["rows read", report.rows, "integer"],
        ["examples", report.examples, "integer"],
        ["drawn an epoch", report.drawn, "integer"],
    ]
    if report.format != "images":
        facts += [["tokens", report.tokens, "integer"], ["supervised", report.supervised_share, "share"]]
    return [*facts, ["bad rows", report.bad_rows, "integer"], ["duplicates", report.duplicates, "integer"]]


def _in_use(record: RunRecord) -> dict[str, str]:
    """Return what the run uses, besides memory, for people."""
    values = {key: value for key, value in asdict(record.in_use).items() if key not in ("memory", "recompute_why")}
    return {key.replace("_", " "): as_yaml(value) for key, value in values.items() if value is not None}


def _command(run: RunDirectory, record: RunRecord) -> str:
    """Return the command that trains the same run again in another folder."""
    processes = record.in_use.processes
    launcher = ["qlora"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}", "-m", "qlora"]
    start = [] if record.started_from is None else ["--resume", record.started_from]
    target = f"train.output_dir={as_yaml(f'{run.path.resolve()}-again')}"
    return shlex.join([*launcher, "train", str(run.config.resolve()), target, *start])


def _environment(record: RunRecord) -> dict[str, str]:
    base, hardware = record.base, record.hardware
    gpus = ", ".join(str(gpu.get("name")) for gpu in hardware.get("gpus") or [] if isinstance(gpu, dict))
    values = {
        "base": base.name,
        "base's commit": base.commit,
        "system": hardware.get("system"),
        "GPUs": gpus or "none",
        "CPU threads": hardware.get("cpu_threads"),
        **record.versions,
        "started from": record.started_from,
    }
    return {key: str(value) for key, value in values.items() if value is not None}
