"""Labels of texts or images, predicted by a run or a release that classifies."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.checkpoint import RunDirectory
from qlora.config import load_config
from qlora.data import Batch, EncodeOptions, ImageProcessor, Labels, Source, collate
from qlora.data.datasets import make_encoder
from qlora.data.documents import image_of
from qlora.data.encode import ExampleEncoder
from qlora.data.examples import Labelled, LabelledImage
from qlora.data.formats import COLUMNS
from qlora.data.image_folders import images_below
from qlora.data.labels import BY_HEAD
from qlora.data.prepare import Encoder
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

TEXT, IMAGE, ID = "text", "image", "id"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The label of one text or image.

    Attributes:
        row: Number of its row, from 1.
        id: The row's own `id`; without one the path of its image, or None for a text.
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
    data: str | Path | Iterable[str | Path | Mapping[str, Any]],
    output: str | Path | None = None,
    text: str | None = None,
    batch_size: int = 16,
    device: str | torch.device = "auto",
) -> list[Prediction]:
    """Predict the labels of texts or images with a run that classifies, or with its merged weights.

    Texts become tokens as in training. Those with too many tokens for `data.max_seq_len` are truncated. Images are
    prepared as in training. Their pixels are in memory for a block of images at a time, so the model is loaded once the
    first block is read, and a damaged image may be found later; then nothing is written.

    Args:
        model: A run, one of its checkpoints, or a folder that it was merged into.
        data: A file of any type that training reads, or texts, or rows as dicts; of images also paths, or a folder,
            whose images are all read, at any depth; names of folders have no meaning here.
        output: A new JSONL file with a line for each row, in their order: `row`, `id`, `label` and `probabilities`. It
            is written whole, or not at all.
        text: Name of the column with the text or image; default: that of the run's config, or `text` or `image`.
        batch_size: Number of texts or images at a time.
        device: `auto` takes a GPU if there is one.

    Returns:
        A prediction for each row, in their order.

    Raises:
        ConfigError: The model does not classify, the output already exists, or batch_size is below 1.
        DataError: Rows have no text or image, or the file can't be read; the message names these rows.
        ModelError: The model can't be loaded.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} should be 1 or more.")
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} already exists; name another file.")
    run = RunDirectory.find(model)
    labels, max_seq_len = read_labels(_labels_file(model, run))
    tokenizer = load_model_tokenizer(str(model))
    has_images = isinstance(tokenizer, ImageProcessor)
    kind = IMAGE if has_images else TEXT
    column = text
    if column is None:
        column = kind if run is None else load_config(run.config).data.columns.get(kind, kind)
    encoder = make_encoder(tokenizer, EncodeOptions(labels=labels))
    assert encoder.labels is not None, "they were given"
    ids: list[Any] = []

    def noted(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            ids.append(row.values.get(ID, _path_of(row.values.get(column)) if has_images else None))
            yield row

    blocks: Iterable[list[TokenizedExample]] = _encode(
        encoder, noted(_read(data, column, has_images)), column, max_seq_len, has_images
    )
    if not has_images:
        # All texts first, so that their errors are reported before tens of gigabytes are loaded.
        blocks = [[*chain.from_iterable(blocks)]]
    loaded: Any = None
    found_scores = [torch.zeros((0, len(labels.names)))]
    for block in blocks:
        if loaded is None:
            loaded, _ = load_model(str(model), device)
        found_scores.append(score_labels(loaded, block, encoder.labels, batch_size))
    scores = torch.cat(found_scores)
    probabilities = scores.sigmoid() if labels.is_multiple else scores.softmax(dim=1)
    predicted = predicted_labels(scores, labels.is_multiple).tolist()
    predictions = [
        Prediction(
            number,
            id,
            [name for name, has in zip(labels.names, found, strict=True) if has]
            if labels.is_multiple
            else labels.names[found],
            dict(zip(labels.names, own, strict=True)),
        )
        for number, (id, own, found) in enumerate(zip(ids, probabilities.tolist(), predicted, strict=True), start=1)
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
            f"{model} has no {LABELS_FILE}, so it does not classify. Give a run with train.objective: classify, "
            "or the folder that qlora merge wrote of one."
        )
    return path


def _read(data: str | Path | Iterable[str | Path | Mapping[str, Any]], column: str, has_images: bool) -> Iterator[Row]:
    """Yield the rows of a file, a folder of images, or values in memory.

    Raises:
        DataError: There is no such file or folder, or a row can't be read.
    """
    if not isinstance(data, str | Path):
        for number, each in enumerate(data, start=1):
            yield Row({column: each} if isinstance(each, str | Path) else dict(each), f"row {number}")
        return
    path = Path(data).expanduser()
    if has_images and path.is_dir():
        for image in images_below(path):
            yield Row({column: str(image.absolute())}, str(image))
        return
    if not path.is_file():
        raise DataError(
            f"There is no file {data}; give a file, or a list of {'images' if has_images else 'texts'} or rows."
        )
    source = Source(str(data), format="images" if has_images else "auto")
    for row in read_rows(source, HeaderRule(source.header, (column,), COLUMNS)):
        if isinstance(row, BadRow):
            raise DataError(f"{row.origin}: {row.problem}")
        yield row


def _path_of(image: Any) -> str | None:
    return str(image) if isinstance(image, str | Path) else None


def _encode(
    encoder: Encoder, rows: Iterable[Row], column: str, max_seq_len: int, has_images: bool
) -> Iterator[list[TokenizedExample]]:
    """Yield blocks of rows as documents with the first label, whose answer stands for any.

    After a row that can't be encoded nothing is yielded; the others are read to report all of these together.

    Args:
        encoder: Encoder of the model.
        rows: The rows.
        column: Column with the text or image.
        max_seq_len: Largest number of tokens of a text.
        has_images: Whether the column has images.

    Raises:
        DataError: Rows can't be encoded.
    """
    assert encoder.labels is not None, "they were given"
    label = encoder.labels.names[:1]
    problems = ProblemLog()
    num_bad, left = 0, iter(rows)
    while block := [*islice(left, encoder.batch_rows)]:
        read: list[tuple[Row, Labelled | LabelledImage]] = []
        for row in block:
            try:
                read.append((row, _document(row, column, label, has_images)))
            except DataError as error:
                problems.add(row.origin, str(error), row.values)
                num_bad += 1
        examples: list[TokenizedExample] = []
        for (row, example), encoded in zip(read, encoder.encode([example for _, example in read]), strict=True):
            is_long = not isinstance(encoded, DataError) and len(encoded.documents[0]) > max_seq_len
            if is_long and isinstance(example, Labelled) and isinstance(encoder, ExampleEncoder):
                encoded = encoder.shorten(example, max_seq_len)
            if isinstance(encoded, DataError):
                problems.add(row.origin, str(encoded), row.values)
                num_bad += 1
            else:
                examples += encoded.documents
        if not num_bad:
            yield examples
    if num_bad:
        head = f"{counted(num_bad, 'row')} can't be classified:"
        raise DataError("\n".join([head, *problem_lines(problems.problems())]))


def _document(row: Row, column: str, label: tuple[str, ...], has_images: bool) -> Labelled | LabelledImage:
    if not has_images:
        return Labelled(text_of(row, column), label)
    image = image_of(row, column)
    return LabelledImage(image if isinstance(image, bytes) else (row.folder or Path()) / image, label)
