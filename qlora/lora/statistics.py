"""Statistics of the inputs of linear layers over a few batches: second moments, and their main directions."""

from collections.abc import Iterable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

_BLOCK_TOKENS = 4096  # that are in fp32 at a time

# By sizes and device, for as long as a layer's statistics hold them.
_test_matrices: WeakValueDictionary[tuple[int, int, torch.device], torch.Tensor] = WeakValueDictionary()


class InputStatistics:
    """Mean and second moment E[xxᵀ] of the inputs x of one or more layers, in memory linear in their features.

    The mean and the mean squares are exact, and so is the whole moment if `directions` covers all features. Otherwise
    the moment G is kept as G Ω for a fixed random orthonormal Ω, (in, directions), from which its largest eigenvalues
    and their vectors follow (Nyström's approximation from a stream, arXiv:1706.05736): good for the first quarter or so
    of `directions`. A batch costs two products, and what several processes have seen is added up by :meth:`tensors`.

    Args:
        in_features: Number of features.
        directions: Columns of Ω, at most `in_features` are used; 0 keeps mean and mean squares alone.
        device: Device of the sums.

    Attributes:
        in_features: Number of features.
        sum: (in,), fp32; sum of the inputs.
        sum_squares: (in,), fp32; sum of their squares.
        count: (), fp32; number of inputs.
    """

    def __init__(self, in_features: int, directions: int = 0, device: torch.device | str = "cpu") -> None:
        if directions < 0:
            raise ValueError(f"directions: {directions!r} should be a whole number from 0.")
        self.in_features = in_features
        self._is_exact = directions >= in_features
        width = min(directions, in_features)
        with torch.inference_mode(False):  # tensors of inference mode could not be summed up outside of it
            self.sum, self.sum_squares = (torch.zeros(in_features, device=device) for _ in range(2))
            self.count = torch.zeros((), device=device)
            self._sketch = torch.zeros(in_features, width, device=device)
            if not self._is_exact:
                self._test = _test_matrix(in_features, width, torch.device(device))

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add inputs, (tokens, in), any floating dtype; sums are in fp32."""
        for part in x.split(_BLOCK_TOKENS):
            block = part.float()
            self.count += len(block)
            self.sum += block.sum(0)
            self.sum_squares += block.square().sum(0)
            if self._sketch.numel():
                self._sketch.addmm_(block.T, block if self._is_exact else block @ self._test)

    def tensors(self) -> list[torch.Tensor]:
        """Return all that is summed, for a sum over processes in place."""
        return [self.count, self.sum, self.sum_squares, self._sketch]

    @property
    def mean(self) -> torch.Tensor:
        """E[x], (in,), fp32."""
        return self.sum / self._seen()

    @property
    def mean_square(self) -> torch.Tensor:
        """E[x²], (in,), fp32: the diagonal of the second moment."""
        return self.sum_squares / self._seen()

    def second_moment(self) -> torch.Tensor:
        """Return E[xxᵀ], (in, in), fp32: exact, or its main directions with the mean squares as its diagonal."""
        if self._is_exact:
            return self._sketch / self._seen()
        vectors, values = self._eigen(centered=False)
        moment = (vectors * values) @ vectors.T
        moment.diagonal().add_((self.mean_square - moment.diagonal()).clamp_min(0))
        return moment

    def top_directions(self, k: int, centered: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the directions in which the inputs are largest, or vary most.

        Args:
            k: Number of directions, at most those that are kept.
            centered: Subtract the mean: the directions are then the principal components of the inputs.

        Returns:
            Orthonormal eigenvectors of E[xxᵀ] or of the covariance, (in, k), from the largest eigenvalue on, and the
            shares of the eigenvalues in the trace, (k,); fp32.
        """
        width = self._sketch.shape[1]
        if not 1 <= k <= width:
            raise ValueError(f"k: {k} should be from 1 to {width}, the number of directions that are kept.")
        vectors, values = self._eigen(centered)
        total = self.mean_square.sum() - (self.mean.square().sum() if centered else 0)
        return vectors[:, :k], values[:k] / total.clamp_min(torch.finfo(torch.float32).tiny)

    def _seen(self) -> torch.Tensor:
        if not self.count:
            raise ValueError("There are no statistics, since no input was seen; run the model on some tokens first.")
        return self.count

    def _eigen(self, centered: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return eigenvectors in columns and eigenvalues, the largest first."""
        sketch = (self._sketch / self._seen()).double()
        mean = self.mean.double()
        if self._is_exact:
            moment = sketch - mean.outer(mean) if centered else sketch
            return _descending(*torch.linalg.eigh((moment + moment.T) / 2))
        # Nyström: G ≈ Y (Ωᵀ Y)⁻¹ Yᵀ with Y = G Ω, as F Fᵀ; the shift keeps ΩᵀY positive definite in spite of rounding.
        test = self._test.double()
        shift = 1e-6 * sketch.norm() + torch.finfo(torch.float32).tiny
        sketch = sketch + shift * test
        core = test.T @ sketch
        root = torch.linalg.cholesky((core + core.T) / 2)
        factor = torch.linalg.solve_triangular(root, sketch.T, upper=False).T
        vectors, roots, _ = torch.linalg.svd(factor, full_matrices=False)
        values = (roots.square() - shift).clamp_min(0)
        if not centered:
            return vectors.float(), values.float()
        inside = vectors.T @ mean
        turn, values = _descending(*torch.linalg.eigh(values.diag() - inside.outer(inside)))
        return (vectors @ turn.double()).float(), values


def _test_matrix(in_features: int, width: int, device: torch.device) -> torch.Tensor:
    """Return Ω, the same in all layers and processes, so that sketches can be added up."""
    key = (in_features, width, device)
    matrix = _test_matrices.get(key)
    if matrix is None:
        generator = torch.Generator().manual_seed(0)
        matrix = torch.linalg.qr(torch.randn(in_features, width, generator=generator)).Q.to(device)
        _test_matrices[key] = matrix
    return matrix


def _descending(values: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return vectors.flip(1).float(), values.flip(0).clamp_min(0).float()


class InputObserver:
    """Collects the statistics of layers' inputs while a model runs; a context that holds the hooks.

        with InputObserver(model, names, directions=256) as observer, torch.inference_mode():
            for batch in batches:
                observer.mask = batch.attention_mask.bool()
                model(input_ids=batch.input_ids, ...)
        observer.statistics["model.layers.0.self_attn.q_proj"].mean_square

    Layers that get the very same tensor, one after the other (q, k and v; gate and up), share their statistics. To
    bound memory further, observe some of the layers at a time and run the model again for the next.

    Args:
        model: Any module.
        names: Names of layers with `in_features`, which take (..., in_features).
        directions: See :class:`InputStatistics`.

    Attributes:
        statistics: By name, of the layers that have seen inputs.
        mask: Bool, of the inputs' shape without the features: the positions that count in the next forward passes;
            None for all.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], directions: int = 0) -> None:
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        if lacking := [name for name, layer in self._layers.items() if not hasattr(layer, "in_features")]:
            raise ValueError(f"Only layers with in_features have statistics of inputs, not {', '.join(lacking)}.")
        self._directions = directions
        self._hooks: list[Any] = []
        self._owners: set[str] = set()
        self._last: tuple[torch.Tensor, InputStatistics] | None = None
        self.statistics: dict[str, InputStatistics] = {}
        self.mask: torch.Tensor | None = None

    def __enter__(self) -> "InputObserver":
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(partial(self._see, name)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._last = None

    def _see(self, name: str, layer: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0]
        shared = self._last[1] if self._last is not None and self._last[0] is x else None
        if name not in self.statistics:
            if shared is None:
                self._owners.add(name)
            self.statistics[name] = shared or InputStatistics(layer.in_features, self._directions, x.device)
        own = self.statistics[name]
        if name in self._owners:
            own.add(self._positions(name, x))
            self._last = (x, own)
        elif shared is not own:
            raise ValueError(f"{name} shared its input with the layer before it, but has another input now.")

    def _positions(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        if self.mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask: its shape {tuple(self.mask.shape)} should be {tuple(x.shape[:-1])}, that of the positions in "
                f"the input of {name}."
            )
        return x[self.mask.to(x.device)]
