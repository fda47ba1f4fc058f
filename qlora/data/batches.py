"""Batches of documents, in a seeded order that follows from the step number alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from qlora.data.packing import Rows, pack_groups
from qlora.data.store import ExampleSet
from qlora.data.tokens import TokenizedExample

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: a document per row, padded on the right, or all documents packed into one row.

    Attributes:
        input_ids: (batch, seq), int64.
        position_ids: (batch, seq), int64: from 0 in every document, which separates the documents of a packed row.
        attention_mask: (batch, seq), int64: 1 for tokens, 0 for padding, by length and never by pad id; None if there
            is no padding.
        labels: (batch, seq), int64: the next token of the document, or `IGNORE_INDEX` where that is not supervised.
        supervised: (supervised labels,), int64: their indices in the flattened batch, computed on the host so that
            no device is synchronized.
        weights: (supervised labels,), fp32, of their losses; None if all are 1.
        cu_seq_lens: (documents + 1,), int32: where each document of a packed row begins, and the end; None if padded.
        lengths: Number of tokens of each document.
        counts: Number of supervised labels of each document, known without synchronizing the device.
        weight_sums: Sum of the weights of each document's labels.
        values: What else is known about the documents, by column: (documents, …) each.
        seeds: Seed of the random numbers of each document; None outside of a run's steps.
        ahead: Means over the whole step that the loss computed ahead of it, (numbers,), fp32; None if it needs none.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    supervised: torch.Tensor
    weights: torch.Tensor | None
    cu_seq_lens: torch.Tensor | None
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    weight_sums: tuple[float, ...]
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    ahead: torch.Tensor | None = None

    @property
    def num_supervised(self) -> int:
        """Number of supervised labels."""
        return sum(self.counts)

    @property
    def total_weight(self) -> float:
        """Sum of the weights of all supervised labels."""
        return sum(self.weight_sums)

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in own.items()}
        return Batch(**moved | {"values": {name: to_device(value, device) for name, value in self.values.items()}})

    def select(self, documents: Sequence[int]) -> "Batch":
        """Return the batch of some of the documents, in the given order, on the same device."""
        lengths, counts = (tuple(values[each] for each in documents) for values in (self.lengths, self.counts))
        is_packed, width = self.cu_seq_lens is not None, max(lengths)
        old_begins, begins = (
            [0, *accumulate(sizes)] if is_packed else range(0, len(sizes) * size, size)
            for sizes, size in ((self.lengths, self.input_ids.shape[1]), (lengths, width))
        )
        first_labels = [0, *accumulate(self.counts)]
        # Where tokens and labels come from, and how far the latter move.
        tokens = [range(old_begins[each], old_begins[each] + self.lengths[each]) for each in documents]
        labels = [range(first_labels[each], first_labels[each] + self.counts[each]) for each in documents]
        shifts = [begins[new] - old_begins[old] for new, old in enumerate(documents)]
        device = self.input_ids.device
        rows, from_tokens, from_labels, moves = (
            to_device(torch.tensor(places, dtype=torch.int64), device)
            for places in (
                documents, [*chain(*tokens)], [*chain(*labels)], np.repeat(shifts, counts),
            )
        )  # fmt: skip

        def take(values: torch.Tensor) -> torch.Tensor:
            return values[:, from_tokens] if is_packed else values[rows, :width]

        is_padded = self.attention_mask is not None and len(set(lengths)) > 1
        return Batch(
            input_ids=take(self.input_ids),
            position_ids=take(self.position_ids),
            attention_mask=take(self.attention_mask) if is_padded and self.attention_mask is not None else None,
            labels=take(self.labels),
            supervised=self.supervised[from_labels] + moves,
            weights=None if self.weights is None else self.weights[from_labels],
            cu_seq_lens=to_device(torch.tensor(begins, dtype=torch.int32), device) if is_packed else None,
            lengths=lengths,
            counts=counts,
            weight_sums=tuple(self.weight_sums[each] for each in documents),
            values={name: value[rows] for name, value in self.values.items()},
            seeds=None if self.seeds is None else tuple(self.seeds[each] for each in documents),
        )


def to_device(value: Any, device: torch.device) -> Any:
    """Copy a tensor to a device; other values, and tensors that are there, are returned as they are."""
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    # Only copies from pinned memory are asynchronous.
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)


def collate(examples: Sequence[TokenizedExample], packed: bool = False, seeds: Sequence[int] | None = None) -> Batch:
    """Collate documents into one batch, with labels shifted by one.

    Args:
        examples: One document each.
        packed: Put all documents into one row, without padding; otherwise each is a row, padded to the longest.
        seeds: Seed of the random numbers of each document.
    """
    lengths = [len(example) for example in examples]
    shape = (1, sum(lengths)) if packed else (len(examples), max(lengths))
    begins = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(examples)) * shape[1]
    input_ids, position_ids, attention_mask = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    labels, weights = np.full(shape, IGNORE_INDEX), np.zeros(shape, dtype=np.float32)
    for begin, example in zip(begins.tolist(), examples, strict=True):
        whole, shifted = slice(begin, begin + len(example)), slice(begin, begin + len(example) - 1)
        input_ids.flat[whole] = example.input_ids
        position_ids.flat[whole] = np.arange(len(example))
        attention_mask.flat[whole] = 1
        weights.flat[shifted] = following = example.weights[1:]
        labels.flat[shifted] = np.where(following > 0, example.input_ids[1:], IGNORE_INDEX)
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    is_plain = all(((example.weights == 0) | (example.weights == 1)).all() for example in examples)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=None if packed or len(set(lengths)) == 1 else torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        supervised=torch.from_numpy(supervised),
        weights=None if is_plain else torch.from_numpy(weights.flat[supervised]),
        cu_seq_lens=torch.tensor([*begins.tolist(), shape[1]], dtype=torch.int32) if packed else None,
        lengths=tuple(lengths),
        counts=tuple(example.num_supervised for example in examples),
        weight_sums=tuple(example.total_weight for example in examples),
        values={
            name: torch.from_numpy(np.stack([each.values[name] for each in examples])) for name in examples[0].values
        },
        seeds=None if seeds is None else tuple(seeds),
    )


def eval_batches(examples: Sequence[TokenizedExample], batch_size: int, capacity: int | None = None) -> Iterator[Batch]:
    """Yield all examples once, the longest first, so that a batch too large for the memory fails at once.

    Args:
        examples: Examples to evaluate on; the groups of an `ExampleSet` stay together.
        batch_size: Number of rows at a time: of packed rows, or of groups.
        capacity: Tokens of a packed row for each document of a group; None gives each group a row of its own.
    """
    if isinstance(examples, ExampleSet):
        lengths, group_size = examples.lengths, examples.group_size
    else:
        lengths, group_size = np.array([len(example) for example in examples]), 1
    rows = pack_groups(lengths, group_size, capacity, longest_first=True)
    for start in range(0, len(rows), batch_size):
        chosen = [examples[index] for row in rows[start : start + batch_size] for index in row]
        yield collate(chosen, packed=capacity is not None)


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The examples of each optimizer step, on each process.

    Examples are first packed into rows, or each group of them is a row of its own; a group is never parted. Every
    epoch is a new permutation of the rows, drawn from (seed, epoch). A step takes `micro_batch_size ·
    gradient_accumulation_steps` rows per process, the last step of an epoch what is left; within a step, rows of
    similar length share a micro-batch, so little is padded and yet no step has long rows only. Everything follows
    from the step number, so a run continues at any step without replaying those before.

    Args:
        lengths: (examples,), int, in tokens.
        micro_batch_size: Number of rows of a micro-batch.
        gradient_accumulation_steps: Number of micro-batches per step, on each process.
        capacity: Tokens of a packed row for each document of a group; None gives each group a row of its own.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes.
        group_size: Number of consecutive examples that form a group.
    """

    lengths: np.ndarray
    micro_batch_size: int
    gradient_accumulation_steps: int
    capacity: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    group_size: int = 1
    rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", pack_groups(self.lengths, self.group_size, self.capacity))

    @property
    def rows_per_step(self) -> int:
        """Number of rows per step, over all processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps that see every example once."""
        return -(-len(self.rows) // self.rows_per_step)

    @property
    def fill(self) -> float:
        """Share of the packed rows that is filled with tokens; 1 if nothing is packed."""
        if not self.capacity:
            return 1.0
        return float(np.sum(self.lengths)) / (len(self.rows) * self.capacity * self.group_size)

    def window(self, step: int) -> list[int]:
        """Return the indices of all examples of a step, over all processes; steps count from 0 over the whole run."""
        return [index for row in self._rows(step) for index in self.rows[row]]

    def micro_batches(self, step: int, num_parts: int = 1) -> list[list[int]]:
        """Return the indices of this process's micro-batches of a step.

        Args:
            step: Number of the step, from 0.
            num_parts: Number of parts that each micro-batch is divided into, or its number of groups if that is
                smaller: less memory for the same sum of losses.
        """
        rows, size = self._rows(step), self.micro_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        own = [[index for row in batch for index in self.rows[row]] for batch in batches[self.rank :: self.world_size]]
        groups = [np.reshape(batch, (-1, self.group_size)) for batch in own]
        return [part.ravel().tolist() for each in groups for part in np.array_split(each, min(num_parts, len(each)))]

    @property
    def max_parts(self) -> int:
        """Number of groups in the largest micro-batch of any process: more parts can't be made of it."""
        return self.micro_batch_size * max(map(len, self.rows)) // self.group_size

    def largest_micro_batch(self) -> list[int]:
        """Return the indices of a micro-batch as large as any step's: the longest rows."""
        longest = np.argsort(-self.rows.num_tokens(self.lengths), kind="stable")[: self.micro_batch_size]
        return [index for row in longest for index in self.rows[row]]

    def _rows(self, step: int) -> list[int]:
        """Return the rows of a step, the longest first."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.rows_per_step
        drawn = _epoch_order(len(self.rows), self.seed, epoch)[start : start + self.rows_per_step].tolist()
        return sorted(drawn, key=lambda row: -sum(int(self.lengths[index]) for index in self.rows[row]))


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)
