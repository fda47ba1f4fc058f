"""Labels of texts, predicted by a run or a release that classifies."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.data import Batch, Labels, Source, collate
from qlora.data.encode import ExampleEncoder
from qlora.data.examples import Labelled
from qlora.data.formats import COLUMNS
from qlora.data.labels import BY_HEAD
from qlora.data.problems import ProblemLog, counted, problem_lines
from qlora.data.rows import BadRow, Row, read_rows
from qlora.data.tables import HeaderRule
from qlora.data.tokens import TokenizedExample
from qlora.data.values import text_of
from qlora.errors import ConfigError, DataError
from qlora.files.atomic import write_text
from qlora.lora import text_model
from qlora.model.label_scores import predicted_labels, word_scores
from qlora.model.labels import LABELS_FILE, read_labels
from qlora.model.loss import model_inputs, supervised_rows
from qlora.model.restore import load_model, load_model_tokenizer
from qlora.model.score import document_scores

TEXT, ID = "text", "id"
# Number of texts that are tokenized at a time.
TEXTS_PER_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Prediction:
    """The label of one text.

    Attributes:
        row: Number of its row, from 1.
        id: The row's own `id`; None if it has none.
        label: Name of the most likely label; where a text can have several, the names of those that are more likely
            than not.
        probabilities: Probability of each label, by name; their sum is 1, unless a text can have several.
    """

    row: int
    id: Any
    label: str | list[str]
    probabilities: dict[str, float]


def predict(
    model: str | Path,
    data: str | Path | Iterable[str | Mapping[str, Any]],
    output: str | Path | None = None,
    text: str | None = None,
    batch_size: int = 16,
    device: str | torch.device = "auto",
) -> list[Prediction]:
    """Predict the labels of texts with a run that classifies, or with its merged weights.

    Texts become tokens as in training. Those with too many tokens for `data.max_seq_len` are truncated.

    Args:
        model: A run, one of its checkpoints, or a folder that it was merged into.
        data: A file of any type that training reads, or texts, or rows as dicts.
        output: A new JSONL file with a line for each row, in their order: `row`, `id`, `label` and `probabilities`. It
            is written whole, or not at all.
        text: Name of the column with the text; default: that of the run's config, or `text`.
        batch_size: Number of texts at a time.
        device: `auto` takes a GPU if there is one.

    Returns:
        A prediction for each row, in their order.

    Raises:
        ConfigError: The model does not classify texts, the output exists already, or batch_size is below 1.
        DataError: Rows have no text, or the file can't be read; the message names these rows.
        ModelError: The model can't be loaded.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} should be 1 or more.")
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} exists already; name another file.")
    run = RunDirectory.find(model)
    labels, max_seq_len = read_labels(_labels_file(model, run))
    if text is None:
        text = TEXT if run is None else load_config(run.config).data.columns.get(TEXT, TEXT)
    rows = list(_read(data, text))
    # The texts first, so that their errors are reported before tens of gigabytes are loaded.
    encoder = ExampleEncoder(load_model_tokenizer(str(model)), labels=labels)
    examples = _encode(encoder, rows, text, max_seq_len)
    assert encoder.labels is not None, "they were given"
    loaded, _ = load_model(str(model), device)
    scores = score_labels(loaded, examples, encoder.labels, batch_size)
    probabilities = scores.sigmoid() if labels.is_multiple else scores.softmax(dim=1)
    predicted = predicted_labels(scores, labels.is_multiple).tolist()
    predictions = [
        Prediction(
            number,
            row.values.get(ID),
            [name for name, has in zip(labels.names, found, strict=True) if has]
            if labels.is_multiple
            else labels.names[found],
            dict(zip(labels.names, own, strict=True)),
        )
        for number, (row, own, found) in enumerate(zip(rows, probabilities.tolist(), predicted, strict=True), start=1)
    ]
    if output is not None:
        lines = (json.dumps(asdict(each), ensure_ascii=False, default=str) + "\n" for each in predictions)
        write_text(Path(output), "".join(lines))
    return predictions


@torch.no_grad()
def score_labels(model: Any, examples: Sequence[TokenizedExample], labels: Labels, batch_size: int) -> torch.Tensor:
    """Compute the scores of labels, the logits of their probabilities.

    Args:
        model: A model that was trained to answer with their words, or one with a score of each.
        examples: A text each; by words with the answer of any label.
        labels: The labels with their answers.
        batch_size: Number of texts at a time.

    Returns:
        (examples, labels), fp32, on the CPU.
    """
    was_training = model.training
    model.eval()
    found = torch.zeros((len(examples), len(labels.names)), dtype=torch.float32)
    order = np.argsort([-len(example) for example in examples], kind="stable")  # texts of about one length together
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[number] for number in chosen]).to(model.device)
        found[torch.from_numpy(chosen)] = _scores(model, batch, labels).float().cpu()
    model.train(was_training)
    return found


def _scores(model: Any, batch: Batch, labels: Labels) -> torch.Tensor:
    if labels.by == BY_HEAD:
        return document_scores(model, batch)
    hidden = text_model(model)(**model_inputs(model, batch)).last_hidden_state
    rows, norm = supervised_rows(hidden, batch)
    return word_scores(model, batch, rows, norm, labels)


def _labels_file(model: str | Path, run: RunDirectory | None) -> Path:
    path = Path(model).expanduser() / LABELS_FILE if run is None else run.labels
    if not path.is_file():
        raise ConfigError(
            f"{model} has no {LABELS_FILE}, so it does not classify texts. Give a run with train.objective: classify, "
            "or the folder that qlora merge wrote of one."
        )
    return path


def _read(data: str | Path | Iterable[str | Mapping[str, Any]], text: str) -> Iterator[Row]:
    if isinstance(data, str | Path):
        if not Path(data).expanduser().is_file():
            raise DataError(f"There is no file {data}; give a file, or a list of texts or rows.")
        source = Source(str(data))
        rows: Iterable[Row | BadRow] = read_rows(source, HeaderRule(source.header, (text,), COLUMNS))
    else:
        rows = (
            Row({text: each} if isinstance(each, str) else dict(each), f"row {number}")
            for number, each in enumerate(data, start=1)
        )
    for row in rows:
        if isinstance(row, BadRow):
            raise DataError(f"{row.origin}: {row.problem}")
        yield row


def _encode(encoder: ExampleEncoder, rows: Sequence[Row], text: str, max_seq_len: int) -> list[TokenizedExample]:
    """Encode rows as texts with the first label, whose answer stands for any."""
    assert encoder.labels is not None, "they were given"
    label = encoder.labels.names[:1]
    examples: list[TokenizedExample] = []
    problems = ProblemLog()
    num_bad = 0
    for start in range(0, len(rows), TEXTS_PER_BLOCK):
        texts: list[Labelled] = []
        block = rows[start : start + TEXTS_PER_BLOCK]
        for row in block:
            try:
                texts.append(Labelled(text_of(row, text), label))
            except DataError as error:
                problems.add(row.origin, str(error), row.values)
                num_bad += 1
        if num_bad:
            continue
        for row, example, encoded in zip(block, texts, encoder.encode(texts), strict=True):
            if not isinstance(encoded, DataError) and len(encoded.documents[0]) > max_seq_len:
                encoded = encoder.shorten(example, max_seq_len)
            if isinstance(encoded, DataError):
                problems.add(row.origin, str(encoded), row.values)
                num_bad += 1
            else:
                examples += encoded.documents
    if num_bad:
        head = f"{counted(num_bad, 'row')} can't be classified:"
        raise DataError("\n".join([head, *problem_lines(problems.problems())]))
    return examples
