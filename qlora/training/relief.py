"""What a run gives up when memory runs out in the middle of it, so that the step can be repeated."""

from typing import Any

import torch

from qlora.data import BatchPlan
from qlora.errors import ModelError
from qlora.layers import apply_recompute, recompute_levels
from qlora.nf4 import NF4Linear
from qlora.training.loop import Progress

# It changes the rounding of results, which a run may not do by itself.
TILED = "offload+tiled"


class MemoryRelief:
    """Takes less memory at every call: kept weights go, then more is computed again, then micro-batches are halved.

    The step's gradient stays the sum over the same examples, divided by the same number. All processes do the same.

    Args:
        model: With adapters.
        plan: Of the batches.
        progress: Its number of parts is raised.
        level: Of recomputation, in use.
        may_raise: Whether it may be another than was asked for.

    Attributes:
        level: Of recomputation, now in use.
        num_held: Dequantized weights that are kept, if they were given up; None before.
    """

    def __init__(self, model: Any, plan: BatchPlan, progress: Progress, level: str, may_raise: bool) -> None:
        self.level = level
        self.num_held: int | None = None
        self._model, self._plan, self._progress, self._may_raise = model, plan, progress, may_raise

    def give_up(self, step: int) -> str:
        """Gives the next thing up.

        Args:
            step: From 0, that memory ran out in.

        Returns:
            What it was, for people.

        Raises:
            ModelError: There is nothing left.
        """
        told = self._release_weights() or self._raise_level() or self._cut_micro_batches()
        if told is None:
            raise ModelError(
                f"Step {step + 1}: memory ran out with single examples at model.recompute={self.level}, so no smaller "
                "step is left. Lower data.max_seq_len or lora.rank, or free the device of other programs; what was "
                "saved is whole, but a run with other settings needs another train.output_dir."
            )
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return told

    def _release_weights(self) -> str | None:
        if self.num_held == 0:
            return None
        self.num_held = 0
        held = [module for module in self._model.modules() if isinstance(module, NF4Linear) and module.is_held]
        for linear in held:
            linear.release()
        return f"{len(held)} dequantized weights are no longer kept" if held else None

    def _raise_level(self) -> str | None:
        levels = recompute_levels(self._model)
        higher = [level for level in levels[levels.index(self.level) + 1 :] if level != TILED]
        if not (self._may_raise and higher):
            return None
        before, self.level = self.level, apply_recompute(self._model, higher[0])
        return f"model.recompute is {self.level} in place of {before}"

    def _cut_micro_batches(self) -> str | None:
        if self._progress.num_parts >= self._plan.max_parts:
            return None
        self._progress.num_parts *= 2
        apply_recompute(self._model, self.level)  # anew, as what it holds on the host is of a step that was left
        return f"micro-batches are computed in {self._progress.num_parts} parts"
