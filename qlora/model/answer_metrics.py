"""Metrics of answers: each compares a model's answers with the references, and is a line in a list."""

import importlib.util
import math
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError

# From answers and references, as many, to a number.
Metric = Callable[[Sequence[str], Sequence[str]], float]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers that are their reference, up to blanks at both ends."""
    return _mean(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))


def contains(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers that contain their reference."""
    return _mean(reference.strip() in answer for answer, reference in zip(answers, references, strict=True))


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers that name the class of their reference, see :func:`class_name`."""
    return exact_match(list(map(class_name, answers)), list(map(class_name, references)))


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 over the classes that the references name, see :func:`class_name`."""
    pairs = [(class_name(answer), class_name(own)) for answer, own in zip(answers, references, strict=True)]
    scores = []
    for name in sorted({own for _, own in pairs}):
        right = sum(answer == own == name for answer, own in pairs)
        scores.append(2 * right / sum((answer == name) + (own == name) for answer, own in pairs))
    return _mean(scores)


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the words of each answer, as SQuAD compares them (arXiv:1606.05250).

    Words are counted in lower case, without punctuation and English articles. Two texts without any are alike.
    """
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        own, expected = Counter(_words(answer)), Counter(_words(reference))
        total = own.total() + expected.total()
        scores.append(2 * (own & expected).total() / total if total else 1.0)
    return _mean(scores)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return sacrebleu's chrF2 of the corpus, 0 to 100."""
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(list(answers), [list(references)]).score


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return sacrebleu's BLEU of the corpus, 0 to 100."""
    from sacrebleu.metrics import BLEU

    return BLEU().corpus_score(list(answers), [list(references)]).score


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "contains": contains,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "f1": token_f1,
    "chrf": chrf,
    "bleu": bleu,
}
ARTICLES = ("a", "an", "the")
NEED_SACREBLEU = ("chrf", "bleu")


def class_name(text: str) -> str:
    """Return the class that a text names: in lower case, without blanks and punctuation at both ends."""
    return text.strip(string.whitespace + string.punctuation).casefold()


def _words(text: str) -> list[str]:
    """Return the words that SQuAD compares."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in plain.split() if word not in ARTICLES]


def load_metric(name: str) -> Metric:
    """Return a metric by its name in `METRICS`, or a function in a Python file, `path/to/file.py:function`.

    The file is run. Its function is called as those of Hugging Face's evaluate and lm-eval are:
    `function(predictions=[…], references=[…])`, and returns a number.

    Raises:
        ConfigError: sacrebleu is needed and not installed, the file can't be run, or it has no such function.
    """
    if name in NEED_SACREBLEU and importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError(f"eval.metrics: {name} needs sacrebleu; run pip install sacrebleu.")
    if name in METRICS:
        return METRICS[name]
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"eval.metrics: {name}: there is no file {path}.")
    module_name = f"qlora_metrics_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where pickle and dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"eval.metrics: {path} can't be run: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"eval.metrics: {path} has no function {attribute}.")
    return lambda answers, references: _call(name, function, answers, references)


def _call(name: str, function: Any, answers: Sequence[str], references: Sequence[str]) -> float:
    """Call a user's function, and check what it returns."""
    try:
        value = function(predictions=list(answers), references=list(references))
    except Exception as error:
        raise ConfigError(
            f"eval.metrics: {name} failed: {type(error).__name__}: {error}; it is called with the lists predictions= "
            "and references=."
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"eval.metrics: {name} returned {value!r:.80}; it should return a finite number.")
    return number


def _mean(values: Any) -> float:
    numbers = list(map(float, values))
    return sum(numbers) / len(numbers)
