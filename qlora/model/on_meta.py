"""A model run on the meta device: its operations without their values, as a device would run them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch.library import _scoped_library
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.data import Batch
from qlora.lora import reads_images
from qlora.model.loss import Loss

# For each 4,096 tokens a step of a few layers has a thousand operations, and 23,000 where layers compute chunks of 64
# tokens. Layers that compute each token by itself would have a million, and what they keep does not grow with the size
# of any tensor. A step is longer where the vocabulary is small.
MAX_OPERATIONS, PER_TOKENS = 100_000, 4096


class OnMeta(TorchDispatchMode):
    """Context in which a model runs on meta tensors.

    Code that reads values of meta tensors gets 0 or True, so that comparisons find tensors equal, and a sequence a
    single document.

    Args:
        num_tokens: Number of tokens that are computed; more may have more operations.
        watch: Called with the results of each operation.

    Attributes:
        num_reads: Number of values that code read: with others, the model might run other operations.
    """

    def __init__(self, num_tokens: int = PER_TOKENS, watch: Callable[[Sequence[Any]], None] | None = None) -> None:
        super().__init__()
        self.num_reads = 0
        self._left = int(MAX_OPERATIONS * max(1, num_tokens / PER_TOKENS))
        self._watch = watch
        self._scope = ExitStack()

    def __enter__(self) -> "OnMeta":
        # On meta tensors torch computes attention from its parts, with all scores; real devices use a fused kernel.
        library = self._scope.enter_context(_scoped_library("aten", "IMPL"))
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._scope.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._left:
            raise NotImplementedError("its layers compute one token at a time")
        self._left -= 1
        kwargs = kwargs or {}
        shortcut = _shortcut(func)
        result = NotImplemented if shortcut is None else shortcut(args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        elif func in READS:
            self.num_reads += 1
        if self._watch is not None:
            self._watch(result if isinstance(result, tuple | list) else (result,))
        return result


def meta_batch(model: Any, loss: Loss, tokens: int, supervised: int) -> Batch:
    """Return a micro-batch of one group of documents; or of images, each a document of one token.

    Args:
        model: Skeleton of the model.
        loss: Loss that the batch is for.
        tokens: Number of tokens of each document, or of images.
        supervised: Number of supervised tokens of each document.
    """
    count, length = (tokens, 1) if reads_images(model) else (loss.group_size, tokens)
    ids = torch.empty(1, count * length, dtype=torch.long, device="meta")
    return Batch(
        input_ids=ids, position_ids=ids, attention_mask=None, labels=ids,
        supervised=torch.empty(supervised * loss.group_size, dtype=torch.long, device="meta"), weights=None,
        cu_seq_lens=torch.arange(0, (count + 1) * length, length, dtype=torch.int32), lengths=(length,) * count,
        counts=(supervised,) * count, weight_sums=(supervised,) * count,
        values={name: value.to("meta").expand(count, *value.shape) for name, value in loss.columns.items()},
    )  # fmt: skip


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


def _grouped_mm(args: Any, _kwargs: Any) -> Any:
    """Return the product of rows and their experts' weights in any dtype; on meta tensors torch has that of bf16."""
    rows, weights = args[:2]
    if not rows.is_meta or (rows.dim(), weights.dim()) != (2, 3):
        return NotImplemented
    return rows.new_empty(len(rows), weights.shape[-1])


# Operations that bring values to the host, if they are of meta tensors.
READS: dict[Any, Shortcut] = {
    torch.ops.aten.equal.default: _equal,
    torch.ops.aten._local_scalar_dense.default: _value,
    torch.ops.aten._to_copy.default: _copy,
}
ANSWERS: dict[Any, Shortcut] = {torch.ops.aten._grouped_mm.default: _grouped_mm, **READS}
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
    """Compute attention with a kernel that saves only inputs, output and logsumexp for the backward.

    A mask with a gradient, such as Doge's, has no such kernel on any device.
    """
    if attn_mask is not None and attn_mask.requires_grad:
        from_parts = torch.ops.aten._scaled_dot_product_attention_math
        return from_parts(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa)[0]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0][..., :width]
