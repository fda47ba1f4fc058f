"""How much of an adapter's update is lost as merged weights are rounded."""

import torch

# Rows of each layer that stand for all of it: few, so that a merge takes no longer.
NUM_ROWS = 16
# Share of the update from which the rounding is worth a note.
NOTED_SHARE = 0.1
REMEDIES = {
    torch.bfloat16: "--dtype float16 rounds in steps an eighth as large",
    torch.float16: "--dtype float32 keeps all of it",
}


class UpdateRounding:
    """The error of rounding merged weights, against the adapter's update, over the first rows of each layer.

    Args:
        dtype: Dtype of the merged weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._error, self._update = dtype, 0.0, 0.0
        self._base: torch.Tensor | None = None

    def keep(self, base: torch.Tensor) -> None:
        """Keep the first rows of a weight without its update, until :meth:`counted` is given the merged ones."""
        self._base = base[:NUM_ROWS].clone()

    def counted(self, merged: torch.Tensor) -> torch.Tensor:
        """Return merged rows, fp32, as they are; count them if those of the base were kept."""
        if self._base is not None:
            rows = merged[:NUM_ROWS]
            self._update += (rows - self._base.to(rows)).square().sum().item()
            self._error += (rows.to(self._dtype).float() - rows).square().sum().item()
            self._base = None
        return merged

    @property
    def share(self) -> float:
        """Norm of the rounding error over the norm of the update; 0 if nothing was counted or there is no update."""
        return (self._error / self._update) ** 0.5 if self._update else 0.0

    @property
    def notes(self) -> list[str]:
        """A note if the rounding changes the weights by a good part of the update."""
        if self.share <= NOTED_SHARE:
            return []
        name = str(self._dtype).removeprefix("torch.")
        return [f"rounding to {name} changes the weights by {self.share:.0%} of the update; {REMEDIES[self._dtype]}"]
