"""Examples to batches, in a seeded order that a step number alone continues."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from qlora.data.packing import Rows, one_per_row, pack_best_fit
from qlora.data.store import ExampleSet
from qlora.data.tokens import TokenizedExample

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: a document per row, padded on the right, or all documents behind one another in one row.

    Attributes:
        input_ids: (batch, seq), int64.
        position_ids: (batch, seq), int64: from 0 in every document; in a row of several this is what keeps them apart.
        attention_mask: (batch, seq), int64: 1 for tokens, 0 for padding, by length and never by pad id; None if there
            is no padding.
        labels: (batch, seq), int64: the token that follows in the document, or `IGNORE_INDEX` where it is not learned.
        supervised: (labels that count,), int64: where they are in the flattened batch, so that no device is asked.
        weights: (labels that count,), fp32, of their losses; None where all count alike.
        cu_seq_lens: (documents + 1,), int32: where each document of a packed row begins, and the end; None if padded.
        lengths: Tokens of each document.
        num_supervised: Labels that count, known without asking the device.
        total_weight: Of them all.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    supervised: torch.Tensor
    weights: torch.Tensor | None
    cu_seq_lens: torch.Tensor | None
    lengths: tuple[int, ...]
    num_supervised: int
    total_weight: float

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                # From pinned memory, or the host may wait for the copy.
                source = value.pin_memory() if device.type == "cuda" else value
                values[name] = source.to(device, non_blocking=True)
        return Batch(**values)


def collate(examples: Sequence[TokenizedExample], packed: bool = False) -> Batch:
    """Puts documents into one batch, their labels shifted by one.

    Args:
        examples: One document each.
        packed: All in one row, without padding; else a row each, padded to the longest.
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
    total_weight = sum(example.total_weight for example in examples)
    is_plain = all(((example.weights == 0) | (example.weights == 1)).all() for example in examples)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        None if packed or len(set(lengths)) == 1 else torch.from_numpy(attention_mask),
        torch.from_numpy(labels),
        torch.from_numpy(supervised),
        None if is_plain else torch.from_numpy(weights.flat[supervised]),
        torch.tensor([*begins.tolist(), shape[1]], dtype=torch.int32) if packed else None,
        tuple(lengths),
        len(supervised),
        total_weight,
    )


def eval_batches(examples: Sequence[TokenizedExample], batch_size: int, capacity: int | None = None) -> Iterator[Batch]:
    """All examples once, the longest first, so that a batch which does not fit fails at once.

    Args:
        examples: To evaluate on.
        batch_size: Examples at a time; of packed ones, rows.
        capacity: Tokens of a row that examples are packed into; None gives each a row of its own.
    """
    lengths = _lengths_of(examples)
    longest_first = np.argsort(-lengths, kind="stable")
    rows = one_per_row(longest_first) if capacity is None else pack_best_fit(lengths, capacity)
    for start in range(0, len(rows), batch_size):
        chosen = [examples[index] for row in rows[start : start + batch_size] for index in row]
        yield collate(chosen, packed=capacity is not None)


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Which examples go into which optimizer step, on which process.

    Examples are first packed into rows of up to `capacity` tokens, or each is a row of its own. Every epoch is a
    new permutation of the rows, drawn from (seed, epoch). A step takes `micro_batch_size ·
    gradient_accumulation_steps` rows per process, the last one of an epoch what is left; within a step, rows of
    like length share a micro-batch, so that little is padded and yet no step is of long ones alone. All follows from
    the step number, so that a run continues anywhere without replaying.

    Args:
        lengths: (examples,), int, in tokens.
        micro_batch_size: Rows of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step, on each process.
        capacity: Tokens of a row that examples are packed into; None gives each a row of its own.
        seed: Of the order.
        rank: This process.
        world_size: Number of processes.
    """

    lengths: np.ndarray
    micro_batch_size: int
    gradient_accumulation_steps: int
    capacity: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    rows: Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        everything, capacity = np.arange(len(self.lengths)), self.capacity
        rows = one_per_row(everything) if capacity is None else pack_best_fit(self.lengths, capacity)
        object.__setattr__(self, "rows", rows)

    @property
    def rows_per_step(self) -> int:
        """Over all processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return -(-len(self.rows) // self.rows_per_step)

    @property
    def fill(self) -> float:
        """Share of the packed rows' room that tokens take; 1 where nothing is packed."""
        return float(np.sum(self.lengths)) / (len(self.rows) * self.capacity) if self.capacity else 1.0

    def window(self, step: int) -> list[int]:
        """Indices of all examples of a step, over all processes; steps count from 0 over the whole run."""
        return [index for row in self._rows(step) for index in self.rows[row]]

    def micro_batches(self, step: int, num_parts: int = 1) -> list[list[int]]:
        """Indices of this process's micro-batches of a step.

        Args:
            step: From 0.
            num_parts: That each is cut into, as far as it has examples, for less memory at the same sum of losses.
        """
        rows, size = self._rows(step), self.micro_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        own = [[index for row in batch for index in self.rows[row]] for batch in batches[self.rank :: self.world_size]]
        return [part.tolist() for batch in own for part in np.array_split(batch, min(num_parts, len(batch)))]

    @property
    def most_examples(self) -> int:
        """That a micro-batch can have, on any process."""
        return self.micro_batch_size * max(map(len, self.rows))

    def largest_micro_batch(self) -> list[int]:
        """Indices of a micro-batch as large as any step's: its longest rows."""
        longest = np.argsort(-self.rows.num_tokens(self.lengths), kind="stable")[: self.micro_batch_size]
        return [index for row in longest for index in self.rows[row]]

    def _rows(self, step: int) -> list[int]:
        """Rows of a step, the longest first."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.rows_per_step
        drawn = _epoch_order(len(self.rows), self.seed, epoch)[start : start + self.rows_per_step].tolist()
        return sorted(drawn, key=lambda row: -sum(int(self.lengths[index]) for index in self.rows[row]))


def _lengths_of(examples: Sequence[TokenizedExample]) -> np.ndarray:
    return examples.lengths if isinstance(examples, ExampleSet) else np.array([len(example) for example in examples])


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)
