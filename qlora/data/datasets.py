"""A training set and a held-out set from sources."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qlora.data.encode import ExampleEncoder
from qlora.data.prepare import Treatment, prepare
from qlora.data.report import DataReport
from qlora.data.sources import Source
from qlora.data.store import ExampleSet, ExampleStore, cache_folder, find_repeats
from qlora.data.template import apply_template
from qlora.errors import ConfigError, DataError, QLoRAError


@dataclass(frozen=True, slots=True)
class Datasets:
    """The examples to learn from, those held out, and the reports, one per source: of training, then of evaluation."""

    train: ExampleSet
    eval: ExampleSet
    reports: list[DataReport]


def build_datasets(
    tokenizer: Any,
    train: Sequence[Source],
    eval: Sequence[Source] | float = 0.0,
    treatment: Treatment | None = None,
    chat_template: str = "auto",
    cache_dir: str | None = None,
    seed: int = 0,
    deduplicate: bool = False,
) -> Datasets:
    """Reads, formats and tokenizes the training and held-out examples, or finds them as they were kept.

    Args:
        tokenizer: Of transformers; gets the chat template.
        train: Where the rows to learn from are.
        eval: Sources too, or the share of each training source's rows to hold out, drawn by `seed`.
        treatment: What is done with examples; by default as :class:`Treatment` says.
        chat_template: See :func:`qlora.data.template.apply_template`.
        cache_dir: Where tokenized examples are kept; the user's cache if None.
        seed: Of the choice of held-out examples, and of what a weight below 1 leaves out.
        deduplicate: Leave out examples whose tokens and weights are those of an earlier one, over all sources in
            their order, and training examples that are in an `eval` source.

    Raises:
        DataError: A source can't be read, or there is nothing to learn from.
        ConfigError: A source's mapping has a name that no format reads. All errors of all sources are told in one, of
            the first one's kind.
    """
    treatment = treatment or Treatment()
    template = apply_template(tokenizer, chat_template)
    encoder = ExampleEncoder(tokenizer, treatment.loss_on)
    cache = cache_folder(cache_dir)
    held_out_sources = [] if isinstance(eval, float | int) else list(eval)
    stores, reports = [], []
    errors: list[QLoRAError] = []
    for source in (*train, *held_out_sources):
        try:
            store, report = prepare(source, encoder, treatment, cache)
        except (ConfigError, DataError) as error:
            errors.append(error)
            continue
        stores.append(store)
        reports.append(replace(report, chat_template=template))
    if errors:
        raise type(errors[0])("\n".join(map(str, errors)))

    # What is held out in files of its own comes first, so that training gives way to it.
    order = [*range(len(train), len(stores)), *range(len(train))]
    left = {number: np.arange(len(stores[number])) for number in order}
    if deduplicate:
        repeats = find_repeats([stores[number] for number in order])
        left = {number: np.flatnonzero(~repeated) for number, repeated in zip(order, repeats, strict=True)}
        reports = [replace(one, deduplicated=one.examples - len(left[number])) for number, one in enumerate(reports)]
    if not any(len(left[number]) for number in range(len(train))):
        raise DataError("data.deduplicate: every training example is also in data.eval, so none is left to learn from.")

    share = float(eval) if isinstance(eval, float | int) else 0.0
    learned, held_out = [], []
    for number, source in enumerate(train):
        kept, out, note = _hold_out(stores[number], left[number], share, seed)
        if not len(kept) and len(left[number]):
            if len(train) == 1:
                raise DataError(
                    f"data.eval: holding out {share} of the {len(left[number])} examples of {source.path} "
                    "leaves none to train on."
                )
            kept, out, note = left[number], out[:0], "no example of it is held out, as none would be left to train on"
        if note:
            reports[number].notes.append(note)
        kept = _draw(kept, source.weight, np.random.default_rng((seed, number)))
        reports[number] = replace(reports[number], drawn=len(kept))
        learned.append(_places(number, kept))
        held_out.append(_places(number, out))
    for number in range(len(train), len(stores)):
        reports[number] = replace(reports[number], drawn=len(left[number]))
        held_out.append(_places(number, left[number]))
    if share and not any(map(len, held_out)):
        reports[0].notes.append("no example is held out, so there is no evaluation")
    return Datasets(
        ExampleSet(stores, np.concatenate(learned)),
        ExampleSet(stores, np.concatenate(held_out)),
        reports,
    )


def _hold_out(
    store: ExampleStore, examples: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Draw whole rows, so that no part of one is trained on; of a single row, a long text, its parts.

    Returns:
        The examples to learn from, those held out, and why the latter are none although a share is asked for.
    """
    if not share or not len(examples):
        return examples, examples[:0], None
    rows, unit_of = np.unique(store.rows[examples], return_inverse=True)
    if len(rows) == 1:
        unit_of = np.arange(len(examples))
    num_units = int(unit_of[-1]) + 1
    count = round(share * num_units)
    if not count:
        what = f"{num_units} {'rows' if len(rows) > 1 else 'examples'}"
        return examples, examples[:0], f"no example of it is held out: {share:g} (data.eval) of {what} rounds to 0"
    is_out = np.isin(unit_of, np.random.default_rng(seed).permutation(num_units)[:count])
    return examples[~is_out], examples[is_out], None


def _draw(examples: np.ndarray, weight: float, generator: np.random.Generator) -> np.ndarray:
    """Examples as often as a weight says: all of them so many times, and for the rest of it a part of them."""
    part = np.sort(generator.permutation(len(examples))[: round(weight % 1 * len(examples))])
    drawn = np.concatenate([*[examples] * int(weight), examples[part]])
    return drawn if len(drawn) else examples[:1]


def _places(store: int, examples: np.ndarray) -> np.ndarray:
    return np.stack([np.full_like(examples, store), examples], axis=1)
