"""Memory of a step at every moment, as polynomials in its tokens, recorded from a step on the meta device."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from qlora.model.on_meta import OnMeta

HEAD = -1


class Bytes(NamedTuple):
    """Bytes as a polynomial: constant + linear · tokens + quadratic · tokens · (tokens of a sequence)."""

    constant: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0

    def plus(self, other: "Bytes", times: float = 1) -> "Bytes":
        """Return the sum of this and a multiple of another."""
        return Bytes(*(one + times * another for one, another in zip(self, other, strict=True)))

    def at(self, tokens: int, row: int) -> float:
        """Return the bytes for a number of tokens, in sequences of `row` tokens."""
        return self.constant + self.linear * tokens + self.quadratic * tokens * row


class Held(NamedTuple):
    """Bytes in use, by kind.

    Attributes:
        activations: Bytes of the layers' activations, saved or in use, and their gradients.
        loss: Bytes of the head's and the loss's tensors.
        buffers: Bytes of tensors whose size does not depend on the tokens, such as dequantized weights.
    """

    activations: Bytes = Bytes()
    loss: Bytes = Bytes()
    buffers: Bytes = Bytes()

    def plus(self, other: "Held", times: float = 1) -> "Held":
        """Return the sum of this and a multiple of another."""
        return Held(*(one.plus(another, times) for one, another in zip(self, other, strict=True)))

    def per_document(self, size: int) -> "Held":
        """Return the bytes in terms of the tokens of `size` documents, given those in terms of one document's."""
        return Held(*(Bytes(one.constant, one.linear / size, one.quadratic / size) for one in self))

    @property
    def total(self) -> Bytes:
        """Sum over all kinds."""
        return self.activations.plus(self.loss).plus(self.buffers)


class Moment(NamedTuple):
    """Memory after an operation.

    Attributes:
        place: Index of the layer that is computed, forward or backward; `HEAD` after the last layer.
        held: Bytes in use after the operation.
    """

    place: int
    held: Held


class Timeline:
    """Context of a step on the meta device that records the bytes of all storages created in it, until they are freed.

    A storage whose size is a multiple of `tokens` or its square scales with the number of tokens or its square, so a
    single step gives the memory for any number of tokens.

    Args:
        tokens: Number of tokens of the step, in one sequence; a prime that divides no other size.
        known: Tensors that exist before.
        fixed: Sizes in bytes that do not depend on the tokens, even if created by the head: those of rows trained in
            full and of their gradients.
        traced: Number of tokens that are computed, if it is not `tokens`.

    Attributes:
        place: Place that the next moments get.
    """

    def __init__(
        self, tokens: int, known: Iterable[torch.Tensor] = (), fixed: Iterable[int] = (), traced: int = 0
    ) -> None:
        self.place = 0
        self._mode = OnMeta(traced or tokens, self._record)
        self._tokens, self._fixed = tokens, {*fixed}
        # By kind and by power of the tokens; plain numbers, since there are thousands of changes.
        self._bytes = [0] * len(Held._fields) * len(Bytes._fields)
        self._moments: dict[tuple[int, ...], None] = {}
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __enter__(self) -> "Timeline":
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    @property
    def held(self) -> Held:
        """Bytes in use now."""
        return _as_held(self._bytes)

    def moments(self) -> list[Moment]:
        """Return the moments after operations that created a storage, without duplicates."""
        return [Moment(place, _as_held(numbers)) for place, *numbers in self._moments]

    def _record(self, results: Sequence[Any]) -> None:
        """Add the moment after an operation, if it created a storage."""
        added = [self._is_new(leaf) for leaf in results if isinstance(leaf, torch.Tensor)]
        if any(added):
            self._moments[self.place, *self._bytes] = None

    def _is_new(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return False
        number, size = self._sort(storage.nbytes())

        def free(_reference: Any) -> None:
            del self._alive[key]
            self._bytes[number] -= size

        self._alive[key] = weakref.ref(storage, free)
        self._bytes[number] += size
        return True

    def _sort(self, size: int) -> tuple[int, int]:
        """Return the index of the number that a storage of a size counts towards, and what it adds to it."""
        if size in self._fixed:
            return Held._fields.index("buffers") * len(Bytes._fields), size
        power = 0
        while power < 2 and size and size % self._tokens == 0:
            size, power = size // self._tokens, power + 1
        kind = "loss" if self.place == HEAD else "activations" if power else "buffers"
        return Held._fields.index(kind) * len(Bytes._fields) + power, size


def _as_held(numbers: Sequence[int]) -> Held:
    powers = len(Bytes._fields)
    return Held(*(Bytes(*numbers[start : start + powers]) for start in range(0, len(numbers), powers)))
