"""Progress of a run: the state that a continued loop starts from."""

import math
from dataclasses import dataclass, fields
from typing import Any

from qlora.errors import CheckpointError

# Number of steps without an overflow before a larger loss scale is tried.
SCALE_GROWTH_STEPS = 2000
# Loss spikes: steps before the first is reported, the weight of a step in the running means, and the distance above
# the usual loss from which a loss is a spike, in usual distances and as a share of the usual loss.
WATCH_AFTER, WATCH_RATE, WATCH_DISTANCES, WATCH_SHARE = 20, 0.03, 6, 0.1


@dataclass(slots=True)
class Progress:
    """State of the loop, besides parameters and optimizer.

    Attributes:
        step: Number of optimizer steps done.
        tokens: Number of tokens trained on, over all processes.
        supervised_tokens: Number of those that are supervised.
        loss_scale: Factor on the loss, which keeps small fp16 gradients from vanishing; not used in other dtypes.
        steps_at_scale: Number of steps without an overflow since the scale last changed.
        skipped: Number of steps skipped because their numbers were not finite.
        num_parts: Number of parts that every micro-batch is split into since memory ran out.
        usual_loss: Running mean of the losses; None before the first.
        usual_distance: Running mean of the distance between a loss and the usual one.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_scale: float = 2.0**16
    steps_at_scale: int = 0
    skipped: int = 0
    num_parts: int = 1
    usual_loss: float | None = None
    usual_distance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Return whether a step's loss is far above those before it, and include it in the running means.

        In the means a spike counts as the highest loss below a spike, so that it does not hide the next.
        """
        if self.usual_loss is None:
            self.usual_loss = loss
        margin = max(WATCH_DISTANCES * self.usual_distance, WATCH_SHARE * abs(self.usual_loss))
        spike = self.step >= WATCH_AFTER and loss > self.usual_loss + margin
        distance = min(loss - self.usual_loss, margin) if spike else loss - self.usual_loss
        self.usual_distance += WATCH_RATE * (abs(distance) - self.usual_distance)
        self.usual_loss += WATCH_RATE * distance
        return spike

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Progress":
        """Return the progress that a checkpoint holds.

        Raises:
            CheckpointError: A value is missing, unknown or out of range.
        """
        kinds = {field.name: field.type for field in fields(cls)}

        def can_be(name: str, value: Any) -> bool:
            if kinds[name] is int:
                return type(value) is int and value >= (name == "num_parts")
            if value is None:
                return name == "usual_loss"
            return type(value) in (int, float) and math.isfinite(value) and (value > 0 or name != "loss_scale")

        if values.keys() != kinds.keys() or not all(can_be(name, value) for name, value in values.items()):
            raise CheckpointError(f"The checkpoint's progress should be numbers of {', '.join(kinds)}, not {values}.")
        return cls(**values)

    def adapt_loss_scale(self, overflowed: bool) -> None:
        """Halve the scale if gradients overflowed, and double it after many steps in which they did not."""
        self.steps_at_scale = 0 if overflowed else self.steps_at_scale + 1
        if overflowed:
            self.loss_scale /= 2
        elif self.steps_at_scale == SCALE_GROWTH_STEPS:
            self.loss_scale, self.steps_at_scale = 2 * self.loss_scale, 0
