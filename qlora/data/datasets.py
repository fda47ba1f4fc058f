"""A training set, and the sets to evaluate on, from sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from qlora.data.cache import cache_folder
from qlora.data.encode import ExampleEncoder
from qlora.data.images import ImageEncoder, ImageProcessor
from qlora.data.label_words import words_note
from qlora.data.labels import Labels
from qlora.data.options import EncodeOptions
from qlora.data.prepare import Encoder, prepare
from qlora.data.report import DataReport
from qlora.data.sources import Source
from qlora.data.store import ExampleSet, ExampleStore, find_repeats
from qlora.data.template import apply_template
from qlora.errors import ConfigError, DataError, QLoRAError

# Sets to evaluate on: the first of `data.eval`, and `data.retain`. Their metrics' names begin with these.
MAIN_SET, RETAIN_SET = "eval", "retain"
Held = Sequence[Source] | float


@dataclass(frozen=True, slots=True)
class Datasets:
    """The data of a run.

    Attributes:
        train: Examples to train on.
        held_out: The sets to evaluate on that have examples, by name: `eval` is the first of `data.eval`, `eval_NAME`
            another one, `retain` are rows of an older task.
        reports: One report per source: first the training sources, then those of `data.eval`.
        retain_reports: One report per source of `data.retain`.
        sources: The sources of all reports.
        labels: Labels of the texts, with the words and tokens that stand for them; None if there are none to learn.
    """

    train: ExampleSet
    held_out: dict[str, ExampleSet]
    reports: list[DataReport]
    retain_reports: list[DataReport]
    sources: list[Source]
    labels: Labels | None = None

    @property
    def eval(self) -> ExampleSet:
        """Examples of the first set in `data.eval`; empty if nothing is held out."""
        return self.held_out.get(MAIN_SET, self.train[:0])

    @property
    def all_reports(self) -> list[DataReport]:
        """Reports of all sources."""
        return [*self.reports, *self.retain_reports]


def build_datasets(
    tokenizer: Any,
    train: Sequence[Source],
    eval: Held | Mapping[str, Held] = 0.0,
    options: EncodeOptions | None = None,
    chat_template: str = "auto",
    cache_dir: str | None = None,
    seed: int = 0,
    deduplicate: bool = False,
    retain: Sequence[Source] = (),
) -> Datasets:
    """Read, format and tokenize training, held-out and retained examples, or take them from the cache.

    Groups of documents that belong together, such as the two of a preference pair, are deduplicated, held out and
    drawn whole.

    Args:
        tokenizer: A tokenizer of transformers, whose chat template is set; or the image processor of a model of images.
        train: Sources of the rows to train on.
        eval: Sources of held-out rows, or the share of each training source's rows to hold out, drawn by `seed`; or
            several of these by the names of their sets, with at most one share.
        options: How examples are tokenized; by default as :class:`EncodeOptions` says.
        chat_template: See :func:`qlora.data.template.apply_template`.
        cache_dir: Folder for tokenized examples; by default one in the user's cache.
        seed: Seed for the choice of held-out examples, and of those that a weight below 1 leaves out.
        deduplicate: Leave out examples with the same tokens and weights as an earlier one, over all sources in their
            order, and training examples that are in an `eval` source.
        retain: Sources of retained examples, all of which are kept.

    Raises:
        DataError: A source can't be read, no example is left to train on, or sources with preference pairs are mixed
            with others.
        ConfigError: A source's mapping has a name that no format reads. The errors of all sources are raised as one,
            of the first error's type.
    """
    options = options or EncodeOptions()
    encoder = make_encoder(tokenizer, options, chat_template)
    cache = cache_folder(cache_dir)
    named = eval if isinstance(eval, Mapping) else {MAIN_SET: eval}
    asked: dict[str, Held] = {**named, RETAIN_SET: retain}
    sources_of = {name: [] if isinstance(held, float | int) else list(held) for name, held in asked.items()}
    stores, reports = [], []
    errors: list[QLoRAError] = []
    for source in chain(train, *sources_of.values()):
        try:
            store, report = prepare(source, encoder, options, cache)
        except (ConfigError, DataError) as error:
            errors.append(error)
            continue
        stores.append(store)
        reports.append(replace(report, chat_template=encoder.template))
    if errors:
        raise type(errors[0])("\n".join(map(str, errors)))

    # Numbers of the stores of each set; those of `retain` are the last.
    numbers = iter(range(len(train), len(stores)))
    numbers_of = {name: list(islice(numbers, len(sources))) for name, sources in sources_of.items()}
    num_others = len(stores) - len(retain)
    # Evaluation sources come first, so that repeats are removed from the training set.
    order = [*range(len(train), num_others), *range(len(train))]
    left = {number: np.arange(stores[number].num_groups) for number in range(len(stores))}
    if deduplicate:
        repeats = find_repeats([stores[number] for number in order])
        left |= {number: np.flatnonzero(~repeated) for number, repeated in zip(order, repeats, strict=True)}
        for number in order:
            store = stores[number]
            removed = (store.num_groups - len(left[number])) * store.group_size
            reports[number] = replace(reports[number], deduplicated=removed)
    if not any(len(left[number]) for number in range(len(train))):
        raise DataError("data.deduplicate: every training example is also in data.eval, so none is left to train on.")

    shares = {name: float(held) for name, held in asked.items() if isinstance(held, float | int)}
    share = sum(shares.values())
    trained: dict[int, np.ndarray] = {}
    held_out: dict[int, np.ndarray] = {}
    for number, source in enumerate(train):
        kept, out, note = _hold_out(stores[number], left[number], share, seed)
        if not len(kept) and len(left[number]):
            if len(train) == 1:
                raise DataError(
                    f"data.eval: holding out {share} of the {len(left[number])} examples of {source.path} "
                    "leaves none to train on."
                )
            kept, out, note = left[number], out[:0], "none of its examples is held out, as none would be left to train"
        if note:
            reports[number].notes.append(note)
        trained[number] = _draw(kept, source.weight, np.random.default_rng((seed, number)))
        held_out[number] = out
        reports[number] = replace(reports[number], drawn=len(trained[number]) * stores[number].group_size)
    for number in range(len(train), len(stores)):
        reports[number] = replace(reports[number], drawn=len(left[number]) * stores[number].group_size)
    if share and not any(map(len, held_out.values())):
        reports[0].notes.append("no example is held out, so there is no evaluation")
    if (note := words_note(encoder.labels)) is not None:
        reports[0].notes.append(note)
    chosen = {name: held_out if name in shares else {n: left[n] for n in numbers_of[name]} for name in asked}
    sets = {name: _choose(stores, groups, reports) for name, groups in chosen.items()}
    return Datasets(
        train=_choose(stores, trained, reports),
        held_out={name: examples for name, examples in sets.items() if len(examples)},
        reports=reports[:num_others],
        retain_reports=reports[num_others:],
        sources=list(chain(train, *sources_of.values())),
        labels=encoder.labels,
    )


def make_encoder(tokenizer: Any, options: EncodeOptions, chat_template: str = "auto") -> Encoder:
    """Return what turns examples into documents: of texts with a tokenizer, or of images with an image processor.

    Args:
        tokenizer: See :func:`build_datasets`.
        options: How examples are tokenized.
        chat_template: See :func:`qlora.data.template.apply_template`.
    """
    if isinstance(tokenizer, ImageProcessor):
        return ImageEncoder(tokenizer, options.labels)
    template = apply_template(tokenizer, chat_template)
    return ExampleEncoder(tokenizer, options.loss_on, options.labels, template)


def _hold_out(
    store: ExampleStore, groups: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Hold out a share of the rows, each with all its groups, or of the groups if they are parts of a single row.

    Returns:
        Groups to train on, groups held out, and why there are none of the latter although a share is asked for.
    """
    if not share or not len(groups):
        return groups, groups[:0], None
    rows, unit_of = np.unique(store.rows[groups], return_inverse=True)
    if len(rows) == 1:
        unit_of = np.arange(len(groups))
    num_units = int(unit_of[-1]) + 1
    count = round(share * num_units)
    if not count:
        what = f"{num_units} {'rows' if len(rows) > 1 else 'examples'}"
        note = f"none of its examples is held out: {share:g} (data.eval) of {what} rounds to 0"
        return groups, groups[:0], note
    is_out = np.isin(unit_of, np.random.default_rng(seed).permutation(num_units)[:count])
    return groups[~is_out], groups[is_out], None


def _draw(groups: np.ndarray, weight: float, generator: np.random.Generator) -> np.ndarray:
    """Repeat groups by the integer part of a weight, and draw a share of them for the rest; at least one."""
    part = np.sort(generator.permutation(len(groups))[: round(weight % 1 * len(groups))])
    drawn = np.concatenate([*[groups] * int(weight), groups[part]])
    return drawn if len(drawn) else groups[:1]


def _choose(stores: Sequence[ExampleStore], groups: dict[int, np.ndarray], reports: Sequence[DataReport]) -> ExampleSet:
    """Collect groups by number of their store.

    Raises:
        DataError: They are not all of the same size.
    """
    first_of: dict[int, DataReport] = {}
    for number, chosen in groups.items():
        if len(chosen):
            first_of.setdefault(stores[number].group_size, reports[number])
    if len(first_of) > 1:
        named = " and ".join(f"{report.source} ({report.format})" for report in first_of.values())
        raise DataError(
            f"{named} can't be mixed, as only one has pairs of answers; leave one out, or set format: chosen for the "
            "pairs."
        )
    size = next(iter(first_of), 1)
    places = [_places(number, chosen, size) for number, chosen in groups.items()]
    return ExampleSet(stores, np.concatenate([np.zeros((0, 2), dtype=np.int64), *places]), size)


def _places(store: int, groups: np.ndarray, group_size: int) -> np.ndarray:
    """Return (documents, 2): number of the store, and of each document of the groups in it."""
    documents = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    return np.stack([np.full_like(documents, store), documents], axis=1)
