"""Memory of a step at every moment, as polynomials in its tokens, recorded from a step on the meta device."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode

HEAD = -1
# For each 4,096 tokens a step of a few layers has a thousand operations, and 23,000 where layers compute chunks of 64
# tokens. Layers that compute each token by itself would have a million, and what they keep does not grow with the size
# of any tensor. A step is longer where the vocabulary is small.
MAX_OPERATIONS, PER_TOKENS = 100_000, 4096


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


class Timeline(TorchDispatchMode):
    """Context that records the bytes of all storages created in it, until they are freed.

    A storage whose size is a multiple of `tokens` or its square scales with the number of tokens or its square, so a
    single step gives the memory for any number of tokens. Code that reads values of meta tensors gets 0 or True, so
    that comparisons find tensors equal, and a sequence a single document.

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
        super().__init__()
        self.place = 0
        self._max_operations = MAX_OPERATIONS * max(1, (traced or tokens) / PER_TOKENS)
        self._tokens, self._fixed = tokens, {*fixed}
        # By kind and by power of the tokens; plain numbers, since there are thousands of changes.
        self._bytes = [0] * len(Held._fields) * len(Bytes._fields)
        self._moments: dict[tuple[int, ...], None] = {}
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self._scope = ExitStack()
        self._num_operations = 0

    def __enter__(self) -> "Timeline":
        # On meta tensors torch computes attention from its parts, with all scores; real devices use a fused kernel.
        library = self._scope.enter_context(_scoped_library("aten", "IMPL"))
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._scope.close()

    @property
    def held(self) -> Held:
        """Bytes in use now."""
        return _as_held(self._bytes)

    def moments(self) -> list[Moment]:
        """Return the moments after operations that created a storage, without duplicates."""
        return [Moment(place, _as_held(numbers)) for place, *numbers in self._moments]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._num_operations += 1
        if self._num_operations > self._max_operations:
            raise NotImplementedError("its layers compute one token at a time")
        kwargs = kwargs or {}
        shortcut = _shortcut(func)
        result = NotImplemented if shortcut is None else shortcut(args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        leaves = result if isinstance(result, tuple | list) else (result,)
        added = [self._is_new(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(added):
            self._moments[self.place, *self._bytes] = None
        return result

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


Shortcut = Callable[[Any, Any], Any]


@cache
def _shortcut(func: Any) -> Shortcut | None:
    """Return a replacement for an operation that torch computes slowly or not at all on meta tensors; None for others.

    A replacement returns NotImplemented for arguments that it does not handle.
    """
    if func in ANSWERS:
        return ANSWERS[func]
    mutated = [each.name for each in func._schema.arguments if each.is_write]
    if len(mutated) == 1 and len(func._schema.returns) == 1:
        name = mutated[0]
        return partial(_written, name)
    if torch.Tag.pointwise in func.tags and not mutated and len(func._schema.returns) == 1:
        is_bool = func._schema.name.removeprefix("aten::") in COMPARISONS
        return partial(_like_inputs, is_bool)
    return None


def _written(name: str, args: Any, kwargs: Any) -> Any:
    """Return the tensor that an operation writes into, without running the operation."""
    tensor = kwargs[name] if name in kwargs else args[0]
    return tensor if tensor.is_meta else NotImplemented


def _like_inputs(is_bool: bool, args: Any, kwargs: Any) -> Any:
    """Return a tensor with the shape, strides and dtype that a pointwise operation's result has."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    largest = max(tensors, key=torch.Tensor.numel)
    if not (largest.is_meta and largest.is_contiguous()):
        return NotImplemented
    for tensor in tensors:
        same = tensor.shape == largest.shape and tensor.stride() == largest.stride()
        if not tensor.is_floating_point() or not (same or tensor.numel() < largest.numel() == _joint_size(tensors)):
            return NotImplemented
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor.dim()), largest.dtype)
    return torch.empty_like(largest, dtype=torch.bool if is_bool else dtype)


def _joint_size(tensors: Sequence[torch.Tensor]) -> int:
    return torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel()


def _equal(args: Any, _kwargs: Any) -> Any:
    return True if args[0].is_meta else NotImplemented


def _value(args: Any, _kwargs: Any) -> Any:
    if not args[0].is_meta:
        return NotImplemented
    return True if args[0].dtype == torch.bool else 0.0


def _copy(args: Any, kwargs: Any) -> Any:
    tensor, device = args[0], kwargs.get("device")
    if not tensor.is_meta or device is None or device.type == "meta":
        return NotImplemented
    return torch.zeros(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype, device=device)


ANSWERS: dict[Any, Shortcut] = {
    torch.ops.aten.equal.default: _equal,
    torch.ops.aten._local_scalar_dense.default: _value,
    torch.ops.aten._to_copy.default: _copy,
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isinf", "isnan"}


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute attention with a kernel that saves only inputs, output and logsumexp for the backward."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0][..., :width]
