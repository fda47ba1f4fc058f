"""Examples to batches, in a seeded order that a step number alone continues."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from qlora.data.tokens import TokenizedExample

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, padded on the right.

    Attributes:
        input_ids: (batch, seq), int64.
        attention_mask: (batch, seq), int64: 1 for tokens, 0 for padding; by length, never by pad id.
        labels: (batch, seq), int64: the token that follows, or `IGNORE_INDEX` where it is not supervised.
        num_supervised: Labels that count, known without asking the device.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    num_supervised: int

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.num_supervised,
        )


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Pads examples to the longest and shifts the labels by one."""
    shape = (len(examples), max(map(len, examples)))
    input_ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids).long()
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        supervised = torch.from_numpy(example.loss_mask[1:])
        labels[row, : len(ids) - 1] = torch.where(supervised, ids[1:], IGNORE_INDEX)
    return Batch(input_ids, attention_mask, labels, sum(example.num_supervised for example in examples))


def eval_batches(examples: Sequence[TokenizedExample], batch_size: int) -> Iterator[Batch]:
    """All examples once, the longest first, so that a batch which does not fit fails at once."""
    ordered = sorted(examples, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size])


@dataclass(frozen=True)
class BatchPlan:
    """Which examples go into which optimizer step, on which process.

    Every epoch is a new permutation drawn from (seed, epoch). A step takes `micro_batch_size ·
    gradient_accumulation_steps` examples per process, the last one of an epoch what is left. All follows
    from the step number, so that a run continues anywhere without replaying.

    Args:
        num_examples: In the training set.
        micro_batch_size: Examples of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step, on each process.
        seed: Of the order.
        rank: This process.
        world_size: Number of processes.
    """

    num_examples: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def examples_per_step(self) -> int:
        """Over all processes."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return -(-self.num_examples // self.examples_per_step)

    def window(self, step: int) -> list[int]:
        """Indices of all examples of a step, over all processes; steps count from 0 over the whole run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.examples_per_step
        order = _epoch_order(self.num_examples, self.seed, epoch)
        return order[start : start + self.examples_per_step].tolist()

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices of this process's micro-batches of a step."""
        window, size = self.window(step), self.micro_batch_size
        batches = [window[start : start + size] for start in range(0, len(window), size)]
        return batches[self.rank :: self.world_size]


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)
