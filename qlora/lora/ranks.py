"""Adaptive rank: components that matter least are removed while a run trains (AdaLoRA, arXiv:2303.10512)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from qlora.lora.linear import LoraLinear

# Shares of the run's steps at which the first and the last components are removed. Before, importance is measured;
# after, those that are left are trained on.
PRUNE_FROM, PRUNE_UNTIL = 0.1, 0.7
# Weight of the past in the running mean of importance, AdaLoRA's β₁.
SMOOTHING = 0.85


class RankBudget:
    """Fewer and fewer components in all adapted layers together; where they matter least, they are removed.

    The importance of component i of a layer is the running mean of mean|aᵢ ∂aᵢ| + mean|bᵢ ∂bᵢ|, with row aᵢ of A,
    column bᵢ of B, and their gradients ∂: about how much the loss would change without them (arXiv:2303.10512, eq. 9
    and 11, with plain factors instead of a singular value decomposition, and without the uncertainty). The importance
    of all layers is compared; every layer keeps its best component. A removed one is zero in A and B and stays so.

    Everything is computed on the layers' device, without waiting for it. Processes with the same values and gradients
    remove the same components.

    Args:
        layers: The adapted layers, on one device, with both factors trained.
        share: Share of all components that is left in the end, above 0 and up to 1.
        total_steps: Number of optimizer steps of the run.

    Attributes:
        importance: (layers, largest rank), fp32; 0 where a layer has fewer components.
        kept: (layers, largest rank), bool: the components that the layers have now.
        first_components: Number of components of all layers at the start.
        num_components: Number of components that are left.

    Raises:
        ValueError: A layer has no factors that are both trained, or `share` is out of range.
    """

    def __init__(self, layers: Sequence[LoraLinear], share: float, total_steps: int) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share: {share!r} should be above 0 and at most 1.")
        if wrong := [layer for layer in layers if layer.spec.kind == "rows" or layer.spec.train != "AB"]:
            raise ValueError(f"layers: components are judged by both factors, but {wrong[0].spec} does not train both.")
        self.layers, self.total_steps = list(layers), total_steps
        ranks = torch.tensor([len(layer.lora_A) for layer in layers], device=layers[0].lora_A.device)
        self.kept = torch.arange(int(ranks.max()), device=ranks.device) < ranks[:, None]
        self.importance = torch.zeros(self.kept.shape, device=ranks.device)
        self.first_components = self.num_components = int(ranks.sum())
        self._last_components = max(len(layers), round(share * self.first_components))

    @property
    def mean_rank(self) -> float:
        """Mean number of components of a layer that are left."""
        return self.num_components / len(self.layers)

    def describe(self) -> str:
        """Return a sentence on the ranks of now."""
        ranks = self.kept.sum(1)
        return (
            f"Of {self.first_components:,} components of the adapters {self.num_components:,} are left: rank "
            f"{self.mean_rank:.4g} on average, {int(ranks.min())} to {int(ranks.max())} by layer."
        )

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the importance that a step's gradient gives the components, before the step's update."""
        for mean, layer in zip(self.importance, self.layers, strict=True):
            now = _sensitivity(layer.lora_A).mean(1) + _sensitivity(layer.lora_B).mean(0)
            mean[: len(now)].lerp_(now, 1 - SMOOTHING)

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Remove components down to a step's budget, after its update, which may have changed removed ones again.

        Args:
            step: Number of the step, from 0.
        """
        due = budget((step + 1) / self.total_steps, self.first_components, self._last_components)
        if due < self.num_components:
            self.num_components = due
            self.kept &= self._places() < due
        if self.num_components < self.first_components:
            self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what is not kept. The momentum of an optimizer moves it on even with a gradient of zero."""
        for kept, layer in zip(self.kept, self.layers, strict=True):
            removed = ~kept[: len(layer.lora_A)]
            layer.lora_A.masked_fill_(removed[:, None], 0)
            layer.lora_B.masked_fill_(removed, 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return everything that a continued run needs: the live buffers, not copies."""
        return {"importance": self.importance, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict` by copying.

        Raises:
            ValueError: The state is that of other layers or ranks.
        """
        wanted, found = (
            {name: tuple(value.shape) for name, value in each.items()} for each in (self.state_dict(), state)
        )
        if wanted != found:
            raise ValueError(f"the state of adaptive ranks has {found}, this run needs {wanted}")
        for name, buffer in self.state_dict().items():
            buffer.copy_(state[name])
        self.num_components = int(self.kept.sum())

    def _places(self) -> torch.Tensor:
        """Return the place of each component by importance, from 0, (layers, largest rank).

        Each layer's best one comes before all others, removed ones come last, and of equal ones the earlier first.
        """
        scores = self.importance.masked_fill(~self.kept, -1)
        is_best = torch.arange(scores.shape[1], device=scores.device) == scores.argmax(1, keepdim=True)
        order = scores.masked_fill(is_best, torch.inf).flatten().argsort(descending=True, stable=True)
        return order.argsort().view_as(scores)


def budget(done: float, first: int, last: int) -> int:
    """Return how many components may be left (arXiv:2303.10512, §3.3).

    The number falls from `first` to `last` between two shares of the run, by a cube: fast at the beginning, and slowly
    at the end.

    Args:
        done: Share of the run's steps that are done, from 0 to 1.
        first: Number at the start.
        last: Number at the end.
    """
    left = min(max((PRUNE_UNTIL - done) / (PRUNE_UNTIL - PRUNE_FROM), 0.0), 1.0)
    return last + round((first - last) * left**3)


def _sensitivity(factor: nn.Parameter) -> torch.Tensor:
    """Return |w ∂w| of each element of a factor, in fp32, as its gradient is."""
    assert factor.grad is not None
    return (factor * factor.grad).abs_()
