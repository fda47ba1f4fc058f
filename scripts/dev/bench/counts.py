"""Counts of a training step that are the same on every run and every machine, so that a test can check them.

Needs torch only. It is next to the scripts that print the counts, because a script can't import from tests; a test
loads it by its path.
"""

import functools
import importlib
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
# Each makes the host wait for a device: it asks for a value, or for a size that depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
READS = ("tolist", "cpu", "numpy")
# Triton's kernels of a decoder layer, by module.
KERNELS = {
    "dequantize": ("dequantize",),
    "norm": ("norm", "norm_gradient"),
    "gated": ("product", "gradients"),
    "rotary": ("rotary",),
}


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes held between forward and backward, counting each storage once and whole.

    Attributes:
        saved: Bytes saved by autograd, as its hooks see them.
        hung: Bytes in attributes of custom functions, which no hook sees.
        alive: Bytes of all storages that the forward made and that still exist, also in closures; includes the loss.
    """

    saved: int
    hung: int
    alive: int


@dataclass(slots=True)
class Work:
    """Operations that were executed.

    Attributes:
        flops: Floating-point operations of matrix products and attention; of causal attention, the unmasked half.
        base_gemms: Number of products with a weight dequantized from 4 bits.
        dequantized: Number of weights dequantized.
        dequantized_statistics: Number of weights whose absmax was dequantized, with double quantization.
        syncs: Reasons for the host to wait, by name. On a CPU nothing waits, and what never leaves the host counts too.
    """

    flops: int = 0
    base_gemms: int = 0
    dequantized: int = 0
    dequantized_statistics: int = 0
    syncs: Counter[str] = field(default_factory=Counter)


def held_for_backward(forward: Callable[[], torch.Tensor], model: torch.nn.Module) -> Held:
    """Run a forward and count the bytes held until its backward.

    Args:
        forward: Function that returns the loss.
        model: Model whose own tensors (parameters, buffers and 4-bit statistics) are not counted.
    """
    owned = {_key(tensor) for tensor in tensors_in(model)}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        kept.add(box := _Kept(tensor))
        return box

    with _Storages() as storages, torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = forward()
    saved = _by_storage(box.tensor for box in kept)
    hung = _by_storage(tensor for node in _nodes(loss.grad_fn) for tensor in tensors_in(getattr(node, "__dict__", {})))
    return Held(
        saved=sum(size for key, size in saved.items() if key not in owned),
        hung=sum(size for key, size in hung.items() if key not in owned and key not in saved),
        alive=storages.alive_bytes(),
    )


class Watch:
    """Context that counts work, also in custom autograd functions and recomputation.

    Operations are counted where they are dispatched, so what a kernel of Triton does is not seen.

    Args:
        device: Device whose values the host waits for.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.work = Work()
        self._device_type, self._entered = torch.device(device).type, ExitStack()

    def __enter__(self) -> Work:
        self._entered.enter_context(_Operations(self.work, self._device_type))
        self._entered.enter_context(_counted_reads(self.work))
        return self.work

    def __exit__(self, *error: Any) -> None:
        self._entered.close()


@contextmanager
def with_kernels(stand_in: Callable[[str], Any] | None = None) -> Iterator[None]:
    """Have tensors of any device computed by the kernels of a GPU, which themselves compute nothing.

    Args:
        stand_in: Returns what stands for a kernel by its name; by default, what does nothing.
    """
    if stand_in is None:
        stand_in = lambda _: _Idle()  # noqa: E731
    quantize = importlib.import_module("qlora.nf4.quantize")
    with ExitStack() as stack:
        for module, names in KERNELS.items():
            kernels = importlib.import_module(f"qlora.kernels.{module}_triton")
            for name in names:
                stack.enter_context(patch.object(kernels, f"_{name}_kernel", stand_in(name)))
        stack.enter_context(patch.object(quantize, "_verified", _Everything()))
        stack.enter_context(patch("qlora.layers.trial.unfused_reason", lambda _: None))
        # What they compute is random.
        stack.enter_context(patch("qlora.layers.trial.is_last_bits", lambda *_: True))
        yield


class _Everything:
    def __contains__(self, _: object) -> bool:
        return True


class _Idle:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def tensors_in(thing: Any, seen: dict[int, Any] | None = None) -> Iterator[torch.Tensor]:
    """Return all tensors that can be reached from an object: by attributes, containers, closures and partial calls."""
    seen = {} if seen is None else seen
    stack = [thing]
    while stack:
        one = stack.pop()
        if one is None or isinstance(one, (str, bytes, int, float, type, types.ModuleType)) or id(one) in seen:
            continue
        seen[id(one)] = one  # kept, so that no other object gets its id
        if isinstance(one, torch.Tensor):
            yield one
        if isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            stack += one
        elif isinstance(one, functools.partial):
            stack += [one.func, one.args, one.keywords]
        elif isinstance(one, types.MethodType):
            stack += [one.__self__, one.__func__]
        elif isinstance(one, types.FunctionType):
            stack += [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
        else:
            stack += [getattr(one, name, None) for name in getattr(type(one), "__slots__", ()) if name[:2] != "__"]
            stack += getattr(one, "__dict__", {}).values()


class _Kept:
    """A saved tensor, which is freed when autograd frees it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Storages(TorchDispatchMode):
    """Record the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, StorageWeakRef | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors(args, kwargs):
            self._made.setdefault(_key(tensor), None)  # not made here: of the model or the batch
        result = func(*args, **kwargs or {})
        for tensor in _tensors(result):
            if _key(tensor) not in self._made:
                # The weak reference also keeps the address from being given to another storage.
                self._made[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return result

    def alive_bytes(self) -> int:
        """Return the bytes of those that still exist."""
        weak = (reference for reference in self._made.values() if reference is not None)
        storages = (torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference in weak)
        return sum(storage.nbytes() for storage in storages if storage is not None)


class _Operations(TorchDispatchMode):
    def __init__(self, work: Work, device_type: str) -> None:
        super().__init__()
        self.work, self.device_type = work, device_type
        self._weights: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, work = func.overloadpacket.__name__.rstrip("_"), self.work  # in place or not
        work.flops += _flops(func, name, args, kwargs, result)
        if name == "dequantize_4bit":
            work.dequantized += 1
            weight = kwargs.get("out", result)
            self._weights[_key(weight)] = StorageWeakRef(weight.untyped_storage())
        elif name == "dequantize_blockwise":
            work.dequantized_statistics += 1
        elif name == "gemm_4bit":  # bitsandbytes' forward: both, and the product, in one
            work.dequantized += 1
            work.dequantized_statistics += _given(func, args, kwargs).get("absmax_8bit") is not None
            work.base_gemms += 1
        elif name in MATRIX_PRODUCTS:
            factors = args[-2:]  # the first argument of addmm is added, not multiplied
            work.base_gemms += any(_key(factor) in self._weights for factor in factors)
        else:
            self._count_sync(name, args, kwargs, result)
        return result

    def _count_sync(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        devices = {tensor.device.type for tensor in _tensors(args, kwargs)}
        if self.device_type not in devices:
            return
        if name in WAITING:
            self.work.syncs[name] += 1
        elif name.startswith("index") and isinstance(args[1], (list, tuple)):
            # Its number of rows is only known once the mask is; a long index is not waited for.
            masks = sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            self.work.syncs.update({"boolean mask": masks} if masks else {})
        elif self.device_type != "cpu" and name in ("_to_copy", "copy") and _tensors(result)[0].device.type == "cpu":
            self.work.syncs["copy to the host"] += 1


@contextmanager
def _counted_reads(work: Work) -> Iterator[None]:
    """Count reads that only show in the call, because on a CPU they dispatch nothing.

    The methods are replaced, because torch turns a `TorchFunctionMode` off during the backward.
    """

    def counted(name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before = work.syncs.copy()
            result = read(tensor, *args, **kwargs)
            work.syncs.clear()  # on a GPU the same read was dispatched as a copy
            work.syncs.update(before)
            work.syncs[name] += 1
            return result

        return call

    with patch.multiple(torch.Tensor, **{name: counted(name) for name in READS}):
        yield


def _flops(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Return the floating-point operations, by the formulas of torch's own counter if it has one."""
    if "scaled_dot_product" in name or name.startswith("causal_attention"):
        # Its own formulas leave out kernels for CPUs, and count what a causal mask skips.
        given = _given(func, args, kwargs)
        shapes = [given[key].shape for key in ("query", "key", "value")]
        spans = [(length, length) for length in given.get("lengths", ())] or [(shapes[0][2], shapes[1][2])]
        flops = sum(_attention_flops(shapes, *span, is_backward=name.endswith("_backward")) for span in spans)
        return flops // 2 if "lengths" in given or given.get("is_causal") else flops
    if name == "gemm_4bit":
        rows, out = result.numel() // result.shape[-1], result.shape[-1]
        return 2 * rows * out * args[0].shape[-1]
    formula = flop_registry.get(getattr(torch.ops.aten, name, None))
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _attention_flops(shapes: Sequence[torch.Size], queries: int, keys: int, is_backward: bool) -> int:
    """Return the operations of attention of a number of queries to keys, given the shapes of all of them.

    As many heads are taken for both, because torch 2.11 has no formula for fewer keys than queries.
    """
    batch, heads, _, _ = shapes[0]
    sizes = zip((queries, keys, keys), (shape[-1] for shape in shapes), strict=True)
    query, key, value = ((batch, heads, *size) for size in sizes)
    if is_backward:
        return sdpa_backward_flop_count((*query[:3], value[-1]), query, key, value)
    return sdpa_flop_count(query, key, value)


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return an operation's arguments by name, whether passed by position or keyword."""
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def _nodes(root: Any) -> Iterator[Any]:
    """Return all nodes of an autograd graph."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            yield node


def _by_storage(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(*things: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, torch.Tensor)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
