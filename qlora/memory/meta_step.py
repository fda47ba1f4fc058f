"""A step on the meta device at each level of recomputation, and the moments of its largest memory."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora.kernels.head import default_chunk
from qlora.kernels.simulated import simulating
from qlora.layers.rebuild import GatedMLP, rebuild_activations
from qlora.layers.recompute import apply_recompute, recompute_levels
from qlora.layers.recompute_mlp import TILE_TOKENS, tile_mlp
from qlora.layers.region import recomputed
from qlora.lora import head_blocks, output_head, trained_rows
from qlora.memory.meta_layers import Stack
from qlora.memory.timeline import HEAD, Bytes, Held, Moment, Timeline
from qlora.model.loss import Loss
from qlora.model.on_meta import OnMeta, meta_batch

# Divides no size, so that every size counts as independent of the tokens.
NEVER = (1 << 61) - 1


def trace_levels(stack: Stack, loss: Loss, wanted: Container[str] | None = None) -> dict[str, list[Moment]]:
    """Run a step at each level of recomputation that the model supports.

    Args:
        stack: Layers of the model, reduced to those that represent the others.
        loss: Loss that is minimized.
        wanted: Levels to run, if they are supported; default: all. On CUDA all are run, as they depend on each other.

    Returns:
        For each level, the fastest first, the memory at each moment that may be the peak.
    """
    model, device = stack.model, stack.device
    with OnMeta():
        rebuild_activations(model)
    levels = recompute_levels(model)
    long = _prime(TILE_TOKENS, model)
    if loss.head is None:
        size = sum(map(len, head_blocks(output_head(model))))
        whole, own = (default_chunk(each, size) for each in (torch.device("meta"), device))
        short = _prime(2 * whole // size, model)
    else:  # nothing is computed in chunks
        short, whole, own = long, 1, 1
    held: dict[str, list[Moment]] = {}
    head: list[Held] = []
    for level in levels:
        if wanted is not None and level not in wanted and device.type != "cuda":
            continue
        apply_recompute(model, level)
        if not head:
            trace = _trace(stack, loss, short, short)
            head = [moment.held.plus(trace.before_head, -1) for moment in trace.moments if moment.place == HEAD]
            head = [one._replace(loss=one.loss._replace(constant=one.loss.constant * own / whole)) for one in head]
        else:
            trace = _trace(stack, loss, long, 1)
        held[level] = _finish(stack, trace, head, trace.layers_hold)
    if device.type == "cuda":
        assert levels[-1] == "full"
        # Offloading moves the layers' inputs to the host, except those of the last layer and of the one being fetched,
        # which the kept layers account for.
        nothing = [Held()] * len(stack.kept)
        layer: Any
        for layer in stack.layers:
            layer._gradient_checkpointing_func = partial(recomputed, keep_weights=False)
        trace = _trace(stack, loss, long, 1)
        held["offload"] = _finish(stack, trace, head, nothing)
        if "mlp" in levels:
            tiled = _fit_tiled(stack, loss)
            of_head = _finish(stack, replace(trace, moments=[]), head, nothing)
            held["offload+tiled"] = [*of_head, Moment(place=0, held=tiled)]
    return {level: _largest(moments) for level, moments in held.items()}


def _fit_tiled(stack: Stack, loss: Loss) -> Held:
    """Return the largest moment as a linear function of the tokens, fitted to two numbers of tiles of fixed size."""
    for module in stack.model.modules():
        if isinstance(module, GatedMLP):
            module.run = tile_mlp
    few, many = (
        max(moment.held.total.constant for moment in _trace(stack, loss, tiles * TILE_TOKENS, 1, NEVER).moments)
        for tiles in (2, 4)
    )
    slope = (many - few) / (2 * TILE_TOKENS * loss.group_size)
    return Held(activations=Bytes(few - 2 * TILE_TOKENS * loss.group_size * slope, slope)).plus(stack.always)


@dataclass(frozen=True, slots=True)
class _Trace:
    moments: list[Moment]
    layers_hold: list[Held]
    before_head: Held


def _trace(stack: Stack, loss: Loss, tokens: int, supervised: int, divisor: int = 0) -> _Trace:
    """Run a step of a micro-batch of one group of documents; or of images, each a document of one token.

    Args:
        stack: Reduced layers.
        loss: Loss that is minimized.
        tokens: Number of tokens of each document, or of images: a prime, or any number with `divisor`.
        supervised: Number of supervised tokens of each document.
        divisor: Sizes that are multiples of it depend on the tokens; `tokens` if not given.
    """
    model, layers, size = stack.model, stack.layers, loss.group_size
    batch = meta_batch(model, loss, tokens, supervised)
    ids, traced = batch.input_ids, batch.input_ids.numel()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = None  # as in `FlatParameters`: gradients of any dtype are added to the fp32 one
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    known = [*model.parameters(), *model.buffers(), ids, batch.supervised, batch.cu_seq_lens, stack.scratch]
    known += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    rows = {parameter.numel() for _, rows in trained_rows(model) for parameter in rows.trained}
    sizes = {numel * dtype.itemsize for numel in rows for dtype in (torch.float32, model.dtype)}
    timeline, starts = Timeline(divisor or tokens, known, sizes, traced=traced), []
    is_backward = False

    def move(place: int) -> None:
        timeline.place = place

    def begin(place: int, inputs: Any) -> None:
        if is_backward:  # it runs forwards too, where it recomputes layers
            return
        move(place)
        if torch.is_grad_enabled():
            starts.append(timeline.held)
            if place and inputs and inputs[0].requires_grad:
                inputs[0].register_hook(lambda _grad: move(place - 1))

    def end(output: Any) -> None:
        if is_backward:
            return
        move(HEAD)
        if torch.is_grad_enabled():
            starts.append(timeline.held)
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _grad: move(len(layers) - 1))

    handles = [
        layer.register_forward_pre_hook(lambda _module, inputs, place=place: begin(place, inputs))
        for place, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(lambda _module, _inputs, output: end(output)))
    try:
        with simulating(stack.device), timeline:
            for computed in loss.training_passes(model, batch):
                is_backward = True
                computed.total.backward()
                is_backward = False
    finally:
        for handle in handles:
            handle.remove()
    # Of the last pass, per token of the whole group.
    starts = [start.per_document(size) for start in starts[-len(layers) - 1 :]]
    holds = [after.plus(before, -1) for before, after in zip(starts, starts[1:], strict=False)]
    moments = [moment._replace(held=moment.held.per_document(size)) for moment in timeline.moments()]
    return _Trace(moments, holds, starts[-1])


def _finish(stack: Stack, trace: _Trace, head: list[Held], layers_hold: Sequence[Held]) -> list[Moment]:
    """Return all moments of a level: those of its layers, and the head's, which are the same at every level."""
    moments = [Moment(place, held.plus(stack.always)) for place, held in trace.moments if place != HEAD]
    moments += [Moment(HEAD, trace.before_head.plus(excess).plus(stack.always)) for excess in head]
    return stack.extrapolate(moments, layers_hold)


def _largest(moments: Sequence[Moment]) -> list[Moment]:
    """Drop the moments that can't be the largest, neither in the layers nor in the head."""
    largest: dict[tuple[bool, Bytes], Moment] = {}
    for moment in sorted(moments, key=lambda one: one.held.total[::-1], reverse=True):
        in_head, total = moment.place == HEAD, moment.held.total
        if not any(
            in_head == known_in_head and all(one >= other for one, other in zip(known, total, strict=True))
            for known_in_head, known in largest
        ):
            largest[in_head, total] = moment
    return list(largest.values())


def _prime(least: int, model: nn.Module) -> int:
    """Return a prime above `least` that divides none of a model's sizes, so that these are not taken for tokens."""
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    number = max(least, 32) + 1
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)) or any(
        size and size % number == 0 for size in sizes
    ):
        number += 1
    return number
