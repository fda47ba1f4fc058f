"""The kernel of :func:`qlora.kernels.cross_entropy.linear_token_loss`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.tiles import power_of_2

# Logits of a row that a program reads at a time.
MOST_COLUMNS = 2048
LAUNCH_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def token_losses_triton_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    row_weights: torch.Tensor | None,
    label_smoothing: float,
    by_probability: bool,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute losses and gradient of a chunk of logits in one launch, in fp32, and write the gradient over the logits.

    Args:
        logits: (rows, vocabulary), contiguous; their gradient is written over them, rounded once.
        labels: (rows,), int64.
        logit_scale: Factor on the logits.
        softcap: Soft cap of the logits.
        row_weights: (rows,), fp32.
        label_smoothing: Share of each target that is spread evenly.
        by_probability: Whether each row's loss is multiplied by the probability of its label.
        needs_grad: Whether the gradient is written.

    Returns:
        Loss and plain cross-entropy of each row, times its weight: (rows,), fp32.
    """
    assert logits.is_contiguous()
    rows, size = logits.shape
    losses, plain = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _token_loss_kernel[(rows,)](
            logits, labels, row_weights, losses, plain, size, logit_scale, 0.0 if softcap is None else softcap,
            label_smoothing, HAS_CAP=softcap is not None, BY_PROBABILITY=by_probability, NEEDS_GRAD=needs_grad,
            COLUMNS=min(MOST_COLUMNS, power_of_2(size)), **LAUNCH_OPTIONS,
        )  # fmt: skip
    return losses, plain


@triton.jit
def _token_loss_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as code.
    logits,
    labels,
    row_weights,
    losses,
    plain,
    size,
    logit_scale,
    softcap,
    label_smoothing,
    HAS_CAP: tl.constexpr,
    BY_PROBABILITY: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    label = tl.load(labels + row)
    weight = 1.0
    if row_weights is not None:
        weight = tl.load(row_weights + row)
    of_label = _transform(tl.load(logits + label).to(tl.float32), logit_scale, softcap, HAS_CAP)
    column = tl.arange(0, COLUMNS)
    # Sums of each place of a tile, relative to the largest there so far; joined after the last tile.
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    sums = tl.full((COLUMNS,), 0.0, tl.float32)
    total = tl.full((COLUMNS,), 0.0, tl.float32)
    for first in range(0, size, COLUMNS):
        inside = first + column < size
        read = tl.load(logits + first + column, mask=inside, other=0.0).to(tl.float32)
        value = _transform(read, logit_scale, softcap, HAS_CAP)
        total += tl.where(inside, value, 0.0)
        higher = tl.where(inside, tl.maximum(largest, value), largest)
        # Places after the last logit have none at all: their largest stays -inf, and their sum 0.
        sums = tl.where(inside, sums * tl.exp(largest - higher) + tl.exp(value - higher), sums)
        largest = higher
    peak = tl.reduce(largest, 0, _larger)
    norm = peak + tl.log(tl.reduce(sums * tl.exp(largest - peak), 0, _add))
    loss = norm - of_label
    tl.store(plain + row, loss * weight)
    if BY_PROBABILITY:
        weight *= tl.exp(-loss)
    mean = tl.reduce(total, 0, _add) / size
    smoothed = loss * (1 - label_smoothing) + (norm - mean) * label_smoothing
    tl.store(losses + row, smoothed * weight)
    if NEEDS_GRAD:
        # All threads have read the label's logit before one of them writes over it.
        tl.debug_barrier()
        for first in range(0, size, COLUMNS):
            inside = first + column < size
            read = tl.load(logits + first + column, mask=inside, other=0.0).to(tl.float32)
            value = _transform(read, logit_scale, softcap, HAS_CAP)
            grad = tl.exp(value - norm) - label_smoothing / size
            grad = tl.where(first + column == label, grad + (label_smoothing - 1), grad)
            if HAS_CAP:
                share = value / softcap
                grad *= 1 - share * share
            grad *= logit_scale * weight
            tl.store(logits + first + column, grad.to(logits.dtype.element_ty), mask=inside)


# The interpreter needs functions of this module: Triton's own sum and maximum stay compiled once they are imported.
@triton.jit
def _add(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit
def _larger(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit
def _transform(value, logit_scale, softcap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    value *= logit_scale
    if HAS_CAP:
        # tanh, whose absolute error counts here: it is that of one rounding.
        value = softcap * (1 - 2 / (1 + tl.exp(2 * value / softcap)))
    return value
