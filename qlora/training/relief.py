"""Reduces the memory of a run's steps after memory ran out."""

from collections.abc import Sequence
from typing import Any

import torch

from qlora.data import BatchPlan
from qlora.errors import ModelError
from qlora.layers import apply_recompute, recompute_levels
from qlora.nf4 import NF4Experts, NF4Linear
from qlora.training.progress import Progress

# Tiles change the rounding of results, so a run does not switch to this level by itself.
TILED = "offload+tiled"


class MemoryRelief:
    """Reduce memory at every call: drop the weight cache, then raise recomputation, then halve micro-batches.

    The step's gradient stays the sum over the same examples, divided by the same number. All processes do the same.

    Args:
        model: Model with adapters.
        plan: Plan of the batches.
        progress: Progress of the run, whose number of parts is raised.
        level: Level of recomputation in use.
        levels: Levels to which it may be raised; none if the config sets the level.

    Attributes:
        level: Level of recomputation now in use.
        num_cached: Number of cached weights once the cache was dropped; None before.
    """

    def __init__(self, model: Any, plan: BatchPlan, progress: Progress, level: str, levels: Sequence[str]) -> None:
        self.level = level
        self.num_cached: int | None = None
        self._model, self._plan, self._progress, self._levels = model, plan, progress, levels

    def reduce_memory(self, step: int) -> str:
        """Take the next measure that reduces memory.

        Args:
            step: Step in which memory ran out, from 0.

        Returns:
            What changed, for people.

        Raises:
            ModelError: No measure is left.
        """
        change = self._release_weights() or self._raise_level() or self._cut_micro_batches()
        if change is None:
            single = {1: "examples", 2: "pairs"}.get(self._plan.group_size, "groups of examples")
            raise ModelError(
                f"Step {step + 1}: memory ran out with single {single} at model.recompute={self.level}, so it can't "
                "be reduced further. Lower data.max_seq_len or lora.rank, or stop other programs on the device; "
                "saved checkpoints are complete, but other settings need another train.output_dir."
            )
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return change

    def _release_weights(self) -> str | None:
        if self.num_cached == 0:
            return None
        self.num_cached = 0
        kinds = NF4Linear | NF4Experts
        cached = [module for module in self._model.modules() if isinstance(module, kinds) and module.is_cached]
        for layer in cached:
            layer.uncache_weight()
        return f"{len(cached)} dequantized weights are no longer cached" if cached else None

    def _raise_level(self) -> str | None:
        levels = recompute_levels(self._model)
        higher = [level for level in levels[levels.index(self.level) + 1 :] if level in self._levels and level != TILED]
        if not higher:
            return None
        before, self.level = self.level, apply_recompute(self._model, higher[0])
        return f"model.recompute is {self.level} instead of {before}"

    def _cut_micro_batches(self) -> str | None:
        if self._progress.num_parts >= self._plan.max_parts:
            return None
        self._progress.num_parts *= 2
        apply_recompute(self._model, self.level)  # again, to free its host memory for the aborted step
        return f"micro-batches are computed in {self._progress.num_parts} parts"
