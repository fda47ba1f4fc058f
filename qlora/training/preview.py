"""Preview of the examples that a config would train on, without loading its model."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora.config import ModelSection, RunConfig, metric_name
from qlora.data import (
    LABEL,
    BatchPlan,
    DataReport,
    Datasets,
    ExampleSet,
    ImageProcessor,
    Labels,
    Piece,
    TokenizedExample,
    as_data_uri,
    pieces,
)
from qlora.data.mismatched import BAD, GOOD, MISMATCHED, RATING
from qlora.data.problems import counted
from qlora.errors import ConfigError, DataError, ModelError
from qlora.files import BaseFiles, find_tokenizer
from qlora.model import (
    adapter_specs,
    base_files,
    build_skeleton,
    datasets_from_section,
    expert_specs,
    labels_from_config,
    load_processor,
    positions_of,
    read_config,
    set_tokens,
    unpackable_reason,
)
from qlora.model.answer_metrics import METRICS, load_metric
from qlora.model.quantization import with_linears
from qlora.objectives import objective_for_data, objective_from_section
from qlora.training.best import check_metric, loss_metrics
from qlora.training.given import as_config
from qlora.training.samples import Sampler, check_file
from qlora.training.schedule import resolve_total_steps
from qlora.training.scoring import questions_of_sets

CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True, slots=True)
class Sample:
    """An example to show.

    Attributes:
        number: Index of the example.
        num_tokens: Number of its tokens.
        num_supervised: Number of its supervised tokens.
        pieces: Its text.
        counts_as: What it is learned as: `chosen` or `rejected` of a pair, rated `good` or `bad`, or the name of its
            label; None for other examples.
        image: The image as a data URI; None for a text.
    """

    number: int
    num_tokens: int
    num_supervised: int
    pieces: list[Piece]
    counts_as: str | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Preview:
    """Examples and statistics of what a config would train on.

    Attributes:
        reports: Report of each source: of training, then of evaluation.
        train_examples: Number of examples of an epoch.
        eval_examples: Number of held-out examples: of the first set in `data.eval`.
        held_out: Number of examples of each set that is evaluated, by its name in metrics.
        tokens_per_epoch: Number of tokens of an epoch.
        max_seq_len: Value of `data.max_seq_len`.
        packing_fill: Share of the packed sequences that is filled with tokens; None if nothing is packed.
        rows_per_epoch: Number of packed sequences, or of examples if nothing is packed.
        steps_per_epoch: Number of optimizer steps of an epoch, on one process.
        total_steps: Number of optimizer steps of the run.
        adapted: Number of layers that get an adapter, by the last part of their names; of mixtures also of stacks of
            experts, such as `experts.down_proj`. Empty if the base's config can't be read.
        problems: Reasons why the config can't be trained as it is.
        samples: Examples spread evenly over those of an epoch. Both answers of a pair follow each other; the answers
            of other rows that KTO compares with are left out.
        group_size: Number of examples that a row becomes: 2 for preference pairs, and for rated answers, each of which
            has the answer of another row beside it.
    """

    reports: list[DataReport]
    train_examples: int
    eval_examples: int
    held_out: dict[str, int]
    tokens_per_epoch: int
    max_seq_len: int
    packing_fill: float | None
    rows_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    adapted: dict[str, int]
    problems: list[str]
    samples: list[Sample]
    group_size: int

    @property
    def unit(self) -> str:
        """Name of what rows become: examples, images, pairs or rated answers."""
        if any(report.format == "images" for report in self.reports):
            return "images"
        if self.group_size == 1:
            return "examples"
        return "rated answers" if any(report.format == "kto" for report in self.reports) else "pairs"

    @property
    def pairs(self) -> list[tuple[Sample, Sample | None]]:
        """The samples, each with the other answer of its pair; None for samples that are no pairs."""
        others = {sample.number - 1: sample for sample in self.samples if sample.counts_as == REJECTED}
        return [(each, others.get(each.number)) for each in self.samples if each.counts_as != REJECTED]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        problems = f", {len(self.problems)} problems" if self.problems else ""
        return (
            f"<Preview: an epoch of {self.train_examples:,} examples, {self.tokens_per_epoch:,} tokens and "
            f"{self.steps_per_epoch:,} steps{problems}>"
        )


def preview(config: RunConfig | str | Path | Mapping[str, Any], num_samples: int = 5) -> Preview:
    """Tokenize a config's data as a run would, without its bad rows, and describe it.

    Args:
        config: Config that :func:`qlora.load_config` returned, or what it takes.
        num_samples: Number of examples to show.

    Raises:
        QLoRAError: The tokenizer or a source can't be read, or no example is left.
    """
    if num_samples < 0:
        raise ConfigError(f"num_samples: {num_samples} should be 0 or more.")
    config = as_config(config)
    section = config.train
    model = config.model
    folder = find_tokenizer(model.base, model.revision, model.trust_remote_code)
    tokenizer = load_processor(folder, model.trust_remote_code)
    new_ids = set_tokens(config.data, tokenizer)
    data = config.data.model_copy(update={"on_bad_row": "drop"})
    labels = labels_from_config(config)
    datasets = datasets_from_section(data, tokenizer, section.seed, new_ids=new_ids, labels=labels)
    problems = objective_from_section(section).unsupported_reasons(datasets.all_reports)
    problems += _problems_of_metrics(config, tokenizer, datasets) if not problems else []
    num_bad = sum(report.bad_rows for report in datasets.all_reports)
    if num_bad and config.data.on_bad_row == "error":
        problems.append(f"data.on_bad_row: error, and {counted(num_bad, 'row')} can't be used.")
    lengths = datasets.train.lengths
    positions, longest = _num_positions(model), int(lengths.max())
    if positions is not None and longest > positions:
        problems.append(f"the longest example has {longest} tokens, but the model positions for {positions}.")
    skeleton = _skeleton(config, folder)
    unpacked_why = unpackable_reason(skeleton, data.max_seq_len) if skeleton is not None and data.packs else None
    adapted: dict[str, int] = {}
    try:
        adapted = {} if skeleton is None else _count_adapted(config, with_linears(skeleton))
    except ModelError as error:
        problems.append(str(error))
    if unpacked_why is not None and data.packing is True:
        problems.append(f"data.packing: true, but {unpacked_why}.")
    elif unpacked_why is not None:
        datasets.reports[0].notes.append(f"documents are not packed, because {unpacked_why}")
    packed = data.packs and unpacked_why is None
    batches = BatchPlan(
        lengths, section.micro_batch_size, section.gradient_accumulation_steps,
        data.max_seq_len if packed else None, group_size=datasets.train.group_size,
    )  # fmt: skip
    return Preview(
        reports=datasets.all_reports,
        train_examples=len(datasets.train),
        eval_examples=len(datasets.eval),
        held_out={name: len(examples) for name, examples in datasets.held_out.items()},
        tokens_per_epoch=int(lengths.sum()),
        max_seq_len=data.max_tokens,
        packing_fill=batches.fill if packed else None,
        rows_per_epoch=len(batches.rows),
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=resolve_total_steps(section.epochs, section.max_steps, batches.steps_per_epoch),
        adapted=adapted,
        problems=problems,
        samples=_samples(tokenizer, datasets.train, num_samples, datasets.labels),
        group_size=datasets.train.group_size,
    )


def _problems_of_metrics(config: RunConfig, tokenizer: Any, datasets: Datasets) -> list[str]:
    """Return what training refuses of weights, metrics and samples, without running a user's file."""
    asked = config.eval.metrics if datasets.held_out else []
    try:
        objective = objective_for_data(config.train, datasets)
        for metric in METRICS.keys() & {*asked}:
            load_metric(metric)
        questions: Iterable[str] = ()
        if asked:
            questions, _ = questions_of_sets(config.eval, config.data, tokenizer, datasets, datasets.held_out)
        names = [f"{name}_{metric_name(metric)}" for name in questions for metric in asked]
        unknown = [f"{name}_{metric_name(metric)}" for name in questions for metric in asked if metric not in METRICS]
        check_metric(config.train, [*loss_metrics(datasets.held_out, objective.loss), *names], unknown)
        check_file(config.train.samples)
        Sampler.from_section(config.train.samples, config.data, tokenizer, datasets, config.train.micro_batch_size)
    except (ConfigError, DataError) as error:
        return [str(error)]
    return []


def _skeleton(config: RunConfig, folder: Path) -> Any:
    """Return the base without weights; None if it is one of images, or its config can't be read."""
    model = config.model
    if config.data.has_images or not (folder / "config.json").is_file():
        return None
    try:
        files = BaseFiles.resolve(model.base, model.revision, model.trust_remote_code, with_weights=False)
        return build_skeleton(files, model.trust_remote_code)
    except ModelError:  # a preview is about the data; training says what is wrong with the base
        return None


def _count_adapted(config: RunConfig, skeleton: Any) -> dict[str, int]:
    """Return the number of adapted layers by the last part of their names, and of stacks of experts by the last two."""
    names = [name.rpartition(".")[2] for name in adapter_specs(skeleton, config.lora)]
    names += [".".join(name.split(".")[-2:]) for name in expert_specs(skeleton, config.lora)]
    return dict(Counter(names))


def _num_positions(section: ModelSection) -> int | None:
    """Return the number of positions of a base; None if its config does not say, or can't be read."""
    try:
        files = base_files(section, with_weights=False)
        return positions_of(files, read_config(files, section.trust_remote_code))
    except ModelError:  # a preview is about the data; training says what is wrong with the base
        return None


def _samples(tokenizer: Any, examples: ExampleSet, count: int, labels: Labels | None) -> list[Sample]:
    """Return groups of documents spread evenly, as samples; a mismatched answer is not learned, so it is left out."""
    size, num_groups = examples.group_size, len(examples) // examples.group_size
    chosen = np.unique(np.linspace(0, num_groups - 1, min(count, num_groups)).astype(int)).tolist()
    return [
        Sample(
            number, len(example), example.num_supervised,
            [] if isinstance(tokenizer, ImageProcessor) else pieces(tokenizer, example),
            _counts_as(example, number % size if size > 1 else None, labels), as_data_uri(example),
        )
        for group in chosen
        for number in range(group * size, (group + 1) * size)
        if (example := examples[number]).values.get(RATING) != MISMATCHED
    ]  # fmt: skip


def _counts_as(example: TokenizedExample, place: int | None, labels: Labels | None) -> str | None:
    """Return what an example is learned as, by its values and its place in its group."""
    if RATING in example.values:
        return {GOOD: "good", BAD: "bad"}[int(example.values[RATING])]
    if labels is not None and LABEL in example.values:
        numbers = np.flatnonzero(example.values[LABEL]) if labels.is_multiple else [int(example.values[LABEL])]
        return ", ".join(labels.names[number] for number in numbers)
    return None if place is None else (CHOSEN, REJECTED)[place]
