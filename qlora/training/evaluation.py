"""Held-out loss of a run, or of the base that a config starts from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from qlora.checkpoint import RunDirectory
from qlora.config import EvalSection, RunConfig, SourceSection, load_config, metric_name
from qlora.data import MAIN_SET, eval_batches, set_special_tokens, supervised_bytes
from qlora.errors import ConfigError, DataError, plain_message
from qlora.files import BaseFiles
from qlora.model import (
    AdapterSource,
    base_from_section,
    check_documents,
    datasets_from_section,
    find_foreign,
    labels_from_config,
    load_model,
    load_model_tokenizer,
    load_processor,
    load_run,
)
from qlora.model import evaluate as evaluate_batches
from qlora.model.source import is_hub_id
from qlora.objectives import by_label, objective_for_data, objective_from_section
from qlora.training.scoring import Scorer


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationReport:
    """Loss of a model on held-out examples.

    Attributes:
        model: The model evaluated: a base, or a base with the adapter of a run.
        examples: Number of examples.
        supervised_tokens: Number of supervised tokens, which a loss of tokens is averaged over.
        loss: Mean loss of the config's objective: for supervised fine-tuning over supervised tokens by their weights,
            in nats.
        perplexity: exp(loss); None for objectives whose loss is not one of tokens.
        bits_per_byte: Bits per UTF-8 byte of the supervised text; None where tokens have weights or no text.
        metrics: Mean of each metric of the config's objective, by name.
        labels: For each label of a classification its name and precision, recall, F1 and number of texts.
        confusion: Number of texts by label and predicted label, of a classification; where a text can have several
            labels, of each label by whether texts have it and whether it is predicted.
        answered: Number of rows that were answered for metrics of answers.
        answer_seconds: Time that this took.
        others: Loss and metrics on the config's other sets, by their names in metrics.jsonl: `eval_NAME_loss`,
            `retain_loss`; empty if another file is evaluated.
        notes: What a user should know about the evaluation.
    """

    model: str
    examples: int
    supervised_tokens: int
    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    labels: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[Any] = field(default_factory=list)
    answered: int | None = None
    answer_seconds: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, metrics by their own names."""
        values = asdict(self)
        return values | values.pop("metrics") | values.pop("others")

    def __repr__(self) -> str:
        is_per_token = self.perplexity is not None
        over = f"{self.supervised_tokens:,} tokens" if is_per_token else f"{self.examples:,} examples"
        return f"<EvaluationReport: loss {self.loss:.4f} over {over}, {self.model}>"


def evaluate(
    target: RunConfig | str | Path,
    data: str | Path | None = None,
    batch_size: int = 4,
    device: str | torch.device = "auto",
    base: str | None = None,
    metrics: Sequence[str] | None = None,
) -> EvaluationReport:
    """Evaluate a run with its adapter, or the base that a config starts from, on held-out examples.

    Args:
        target: A run, one of its checkpoints, a PEFT adapter made elsewhere, a config file, or a config of
            :func:`qlora.load_config`.
        data: A file to evaluate on instead of the examples that the config holds out; every row counts.
        batch_size: Number of examples per batch.
        device: `auto` takes a GPU if there is one.
        base: Base of an adapter made elsewhere, which is loaded in NF4; None for the one that its config names.
        metrics: Metrics of answers instead of those of `eval.metrics`. A function in a file is run only if it is named
            here or in a config that is given, not if a run's config names it.

    Raises:
        ConfigError: The config holds out no example and no file is given, no file is given for an adapter made
            elsewhere, a base is given for anything else, or batch_size is below 1.
        QLoRAError: The run, the base or the data can't be read.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} should be 1 or more.")
    foreign = None
    if not isinstance(target, RunConfig) and (Path(target).expanduser().is_dir() or is_hub_id(target)) or base:
        foreign = find_foreign(str(target), base)
    if foreign is not None:
        if data is None:
            raise ConfigError(f"{target} was made elsewhere and holds out no example; name a file with --data (data=).")
        config, run, own_template, labels = _config_for(foreign, data), None, True, None
    else:
        run = None if isinstance(target, RunConfig) else RunDirectory.find(str(target))
        config = target if isinstance(target, RunConfig) else load_config(target if run is None else run.config)
        own_template, labels = run is not None, labels_from_config(config, run)
    # The data and the metrics first, so that their errors are reported before tens of gigabytes are loaded.
    if run is None and foreign is None:
        given = config.model
        files = BaseFiles.resolve(given.base, given.revision, given.trust_remote_code)
        tokenizer = load_processor(files.folder, given.trust_remote_code)
        check_documents(config.data, tokenizer)
    else:
        tokenizer = load_model_tokenizer(str(target), base)
    section = config.data
    if run is None and foreign is None:  # the base, without the tokens that training adds
        own = {key: token for key, token in section.special_tokens.items() if token not in section.new_tokens}
        set_special_tokens(tokenizer, own)
    if data is not None:
        # Every row of the file counts, even if the run limits the rows that it trains on.
        source = SourceSection(path=str(data))
        whole_file = {"train": [source], "eval": None, "retain": None, "max_rows": None, "deduplicate": False}
        section = section.model_copy(update=whole_file)
    asked, notes = config.eval, []
    if metrics is not None:
        try:
            asked = EvalSection.model_validate(config.eval.model_dump() | {"metrics": list(metrics)})
        except ValidationError as error:
            raise ConfigError(f"metrics: {plain_message(error.errors()[0]['msg'])}.") from None
    elif own_template:  # nobody here chose the code that a run names
        functions = [metric for metric in asked.metrics if metric_name(metric) != metric]
        asked = asked.model_copy(update={"metrics": [each for each in asked.metrics if each not in functions]})
        notes += [f"{each} was not run; add --metric {each} (metrics= in Python) to run it" for each in functions]
    try:
        datasets = datasets_from_section(
            section, tokenizer, config.train.seed, own_template=own_template, labels=labels
        )
    except (ConfigError, DataError) as error:
        raise error if data is None else type(error)(f"--data {data} (data= in Python): {error}") from None
    if problems := objective_from_section(config.train).unsupported_reasons(datasets.all_reports):
        raise ConfigError("\n".join(problems))
    examples = datasets.train if data is not None else datasets.eval
    if not len(examples):
        raise ConfigError(f"{target}: data.eval holds out no example; name a file with --data (data= in Python).")
    sets = {MAIN_SET: examples} if data is not None else datasets.held_out
    scorer = Scorer.from_section(asked, section, tokenizer, datasets, sets, batch_size)
    notes += scorer.notes
    objective = objective_for_data(config.train, datasets)
    loss = objective.loss
    if foreign is not None:
        model, _ = load_model(str(target), device, base)
    elif run is None:
        model = base_from_section(config.model, device, head=loss.head, seed=config.train.seed)
    else:
        model, _ = load_run(str(target), device, loss.has_reference)
    result = evaluate_batches(model, eval_batches(examples, batch_size), loss=loss)
    others: dict[str, float] = {}
    for name, held_out in datasets.held_out.items() if data is None else ():
        if name != MAIN_SET:
            other = evaluate_batches(model, eval_batches(held_out, batch_size), loss=loss)
            others |= {f"{name}_{metric}": value for metric, value in {"loss": other.loss, **other.metrics}.items()}
    scores = scorer.score(model, tokenizer)
    for name, values in scores.by_set.items():
        others |= {} if name == MAIN_SET else {f"{name}_{metric}": value for metric, value in values.items()}
    step = "" if run is None else f", step {RunDirectory.open(str(target)).step}"
    names = datasets.labels.names if datasets.labels is not None else ()
    num_bytes = 0 if result.bits is None else supervised_bytes(tokenizer, examples)
    is_plain = result.total_weight == result.num_supervised  # weighted tokens have no bits
    return EvaluationReport(
        model=f"{config.model.base} with the adapter of {target}{step}" if own_template else config.model.base,
        examples=len(examples),
        supervised_tokens=result.num_supervised,
        loss=result.loss,
        perplexity=result.perplexity,
        bits_per_byte=result.bits / num_bytes if num_bytes and is_plain and result.bits is not None else None,
        metrics=result.metrics | scores.by_set.get(MAIN_SET, {}),
        labels=[each.described(name) for name, each in zip(names, by_label(result.counts), strict=True)],
        confusion=result.counts,
        answered=scores.answered or None,
        answer_seconds=round(scores.seconds, 3) if scores.answered else None,
        notes=notes,
        others=others,
    )


def _config_for(source: AdapterSource, data: str | Path) -> RunConfig:
    """Return a config of default values with an adapter's base and data.

    Raises:
        ConfigError: The adapter is a classifier's, whose labels are not known.
    """
    head = source.head
    if head is not None and head.num_labels > 1:
        raise ConfigError(
            f"{source.path} gives texts {head.num_labels} scores; only a model with a single score, a reward, can be "
            "evaluated if it was made elsewhere."
        )
    return RunConfig.model_validate(
        {
            "model": {"base": source.base},
            "data": {"train": [{"path": str(data)}], "eval": None},
            "train": {"output_dir": str(source.folder), "objective": "sft" if head is None else "reward"},
        }
    )
