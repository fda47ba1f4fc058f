"""Causal attention on a CPU as products of blocks of queries with the keys that they see.

torch's own kernel for CPUs computes its products at a lower rate than matrix products reach. These are matrix products,
in the dtype of the inputs; scores are rounded to it, as transformers' eager attention rounds them. Where torch's kernel
computes in AMX's tiles, which only its forward does, the forward is left to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

# Number of queries of a block: few enough that little is computed of the scores that the causal mask hides. With AMX,
# products are so fast that larger ones are worth it.
BLOCK, BLOCK_WITH_TILES = 128, 256
# Documents are padded to multiples of it. For each new size oneDNN compiles code and keeps it, so lengths that are all
# different would take seconds and gigabytes.
PAD_TO = 32
# Number of scores that are computed at a time, unless those of one key head and a block of queries are more.
TILE = 1 << 20
# Number of the queries' features that are computed at a time, unless one document has more.
GROUP_ELEMENTS = 1 << 20
# Length of the longest document. Longer ones have so many sizes of blocks that torch's kernel is as fast.
MAX_LENGTH = 4096
# Mean length of documents up to which they are faster as blocks where torch's kernel computes in AMX's tiles, as
# docs/benchmarks/attention.md shows.
MAX_MEAN_WITH_TILES = 512


def has_tiles() -> bool:
    """Return whether the processor has AMX."""
    # torch has no public function for this that all supported versions share.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def takes_blocks(lengths: Sequence[int], device: torch.device) -> bool:
    """Return whether documents of these lengths are computed faster as blocks than one by one by torch's kernel.

    On the meta device it does not depend on this machine's processor.
    """
    if device.type == "cpu" and has_tiles() and sum(lengths) > MAX_MEAN_WITH_TILES * len(lengths):
        return False
    return max(lengths, default=0) <= MAX_LENGTH


def describe_blocks() -> str:
    """Return how attention is computed in bf16 on this machine's CPU, for reports."""
    if has_tiles():
        return (
            "products of blocks; with AMX, torch's kernel forward, and in both directions over "
            f"{MAX_MEAN_WITH_TILES:,} tokens a document on average"
        )
    return f"products of blocks to {MAX_LENGTH:,} tokens"


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Compute causal attention within each document; only the arguments are saved for the backward.

    Args:
        query: (batch, heads, seq, head_dim).
        key: (batch, kv_heads, seq, head_dim); `heads` is a multiple of `kv_heads`.
        value: (batch, kv_heads, seq, width).
        lengths: Number of tokens of each document of a row; default: the row is one document.
        scale: Factor on the scores; default: 1 / √head_dim.
        window: Number of tokens that each token sees, itself included; default: all.

    Returns:
        (batch, seq, heads, width).

    Raises:
        ValueError: The lengths are not those of documents that fill a row, or the window is empty.
    """
    lengths = [query.shape[2]] if lengths is None else list(lengths)
    if sum(lengths) != query.shape[2] or min(lengths, default=0) < 1:
        raise ValueError(f"lengths {lengths} should be 1 or more each, and add up to {query.shape[2]} tokens")
    if window is not None and window < 1:
        raise ValueError(f"window {window} should be 1 or more")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    attended: torch.Tensor = _forward(query, key, value, lengths, scale, window)
    return attended


@torch.library.custom_op("qlora::causal_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    output, groups = _like_output(query, key, value), query.shape[1] // key.shape[1]
    for documents in _groups(lengths, query):
        q, k, v = map(documents.take, (query, key, value))
        if _is_left_to_torch(q, v, window):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            attended = q.new_empty(*q.shape[:3], v.shape[3])
            q, by_head = (each.unflatten(1, (-1, groups)).flatten(0, 1) for each in (q * scale, attended))
            q, k, v = q.contiguous(), k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()
            for tile in _tiles(q, window):
                by_head[tile.heads, :, tile.queries] = tile.split(tile.weights(q, k) @ tile.seen(v))
        documents.put(attended, output.transpose(1, 2))
    return output


@torch.library.custom_op("qlora::causal_attention_backward", mutates_args=())
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads, groups = [torch.empty_like(tensor) for tensor in (query, key, value)], query.shape[1] // key.shape[1]
    for documents in _groups(lengths, query):
        taken = (documents.take(tensor) for tensor in (query, grad_output.transpose(1, 2)))
        q, grad = (each.unflatten(1, (-1, groups)).flatten(0, 1).contiguous() for each in taken)
        k, v = (documents.take(tensor).flatten(0, 1).contiguous() for tensor in (key, value))
        q, scaled = q * scale, k * scale
        grad_q = torch.empty_like(q)
        # Sums over tiles, in which 16 bits would round each term.
        sum_k, sum_v = (torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in (k, v))
        for tile in _tiles(q, window):
            weights, rows = tile.weights(q, k), tile.take(grad)
            tile.seen(sum_v).add_(weights.mT @ rows)
            grad_scores = torch._softmax_backward_data(rows @ tile.seen(v).mT, weights, -1, q.dtype)
            grad_q[tile.heads, :, tile.queries] = tile.split(grad_scores @ tile.seen(scaled))
            tile.seen(sum_k).add_(grad_scores.mT @ tile.take(q))
        for computed, result in zip((grad_q, sum_k, sum_v), grads, strict=True):
            documents.put(computed, result)
    return grads[0], grads[1], grads[2]


@_forward.register_fake
def _like_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    batch, heads, length = query.shape[:3]
    return query.new_empty(batch, length, heads, value.shape[3])


@_backward.register_fake
def _like_inputs(_: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in inputs[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_backward(grad_output, *ctx.saved_tensors, *ctx.settings), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries of a document whose scores are computed at a time.

    Attributes:
        heads: Key heads.
        queries: The queries.
        keys: The keys that at least one of them sees.
        window: Number of tokens that each token sees.
    """

    heads: slice
    queries: slice
    keys: slice
    window: int | None

    def take(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the tile's rows of (key heads, groups, length, width), as (key heads, groups · queries, width)."""
        return queries[self.heads, :, self.queries].flatten(1, 2)

    def seen(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the tile's keys of (key heads, length, width), as (key heads, keys, width)."""
        return keys[self.heads, self.keys]

    def split(self, queries: torch.Tensor) -> torch.Tensor:
        """Return (key heads, groups · queries, width) as (key heads, groups, queries, width), a view."""
        return queries.unflatten(1, (-1, self.queries.stop - self.queries.start))

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return the softmax of the scores, (key heads, groups · queries, keys)."""
        scores = self.take(q) @ self.seen(k).mT
        first, stop, start = self.queries.start, self.queries.stop, self.keys.start
        by_query = self.split(scores)
        by_query[..., first - start :].add_(q.new_full((stop - first, stop - first), -torch.inf).triu_(1))
        if self.window is not None and start < stop - self.window:  # the last query does not see the first keys
            keys = torch.arange(start, stop - self.window, device=q.device)
            is_before = keys <= torch.arange(first, stop, device=q.device)[:, None] - self.window
            by_query[..., : len(keys)].masked_fill_(is_before, -torch.inf)
        return scores.softmax(-1)


def _tiles(q: torch.Tensor, window: int | None) -> Iterator[_Tile]:
    """Yield the tiles of documents' queries, (key heads, groups, length, head_dim)."""
    num_heads, groups, length, _ = q.shape
    block = BLOCK_WITH_TILES if has_tiles() else BLOCK
    for first in range(0, length, block):
        queries = slice(first, min(first + block, length))
        keys = slice(0 if window is None else max(0, first + 1 - window), queries.stop)
        step = max(1, TILE // (groups * (queries.stop - first) * (keys.stop - keys.start)))
        for head in range(0, num_heads, step):
            yield _Tile(slice(head, min(head + step, num_heads)), queries, keys, window)


@dataclass(frozen=True, slots=True)
class _Documents:
    """Documents that are computed together, because they have the same length with zeros after them.

    Attributes:
        places: Row of the batch and tokens of each.
        length: Their length with the zeros, which no token of them sees.
    """

    places: Sequence[tuple[int, slice]]
    length: int

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return their tokens of (batch, heads, seq, width), as (documents, heads, length, width).

        They are contiguous, unless they are all tokens of the batch as they are.
        """
        whole = slice(0, tensor.shape[2])
        if self.length == whole.stop and self.places == [(row, whole) for row in range(len(tensor))]:
            return tensor
        taken = tensor.new_empty(len(self.places), tensor.shape[1], self.length, tensor.shape[3])
        for document, (row, tokens) in zip(taken, self.places, strict=True):
            number = tokens.stop - tokens.start
            document[:, :number] = tensor[row, :, tokens]
            document[:, number:] = 0
        return taken

    def put(self, computed: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write what was computed of their heads, contiguous, to their tokens of (batch, heads, seq, width)."""
        of_documents = computed.view(len(self.places), tensor.shape[1], self.length, tensor.shape[3])
        for document, (row, tokens) in zip(of_documents, self.places, strict=True):
            tensor[row, :, tokens] = document[:, : tokens.stop - tokens.start]


def _groups(lengths: Sequence[int], query: torch.Tensor) -> Iterator[_Documents]:
    """Yield documents that are computed together: few calls for many short ones, and little memory for long ones."""
    batch, heads, _, width = query.shape
    by_length: dict[int, list[tuple[int, slice]]] = {}
    for stop, length in zip(accumulate(lengths), lengths, strict=True):
        places = by_length.setdefault(length + -length % PAD_TO, [])
        places += ((row, slice(stop - length, stop)) for row in range(batch))
    for length, places in by_length.items():
        step = max(1, GROUP_ELEMENTS // (heads * length * width))
        for first in range(0, len(places), step):
            yield _Documents(places[first : first + step], length)


def _is_left_to_torch(query: torch.Tensor, value: torch.Tensor, window: int | None) -> bool:
    """Return whether the forward is left to torch's kernel."""
    return window is None and query.shape[3] == value.shape[3] and query.dtype == torch.bfloat16 and has_tiles()
