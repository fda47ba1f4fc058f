"""The kernels of :class:`qlora.kernels.gated.GatedProduct`; importing this imports Triton."""

import torch
import triton
import triton.language as tl

from qlora.kernels.tiles import num_tiles

BLOCK = 1024
# Nothing is fused, so that sums and products round as torch's do.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def gated_product_triton(activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute act(gate) · up, reading and writing each value once."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _product_kernel[(num_tiles(gate.numel(), BLOCK),)](
            gate, up, out, gate.numel(), ACTIVATION=activation, BLOCK=BLOCK, **LAUNCH_OPTIONS
        )
    return out


def gated_gradients_triton(
    activation: str, grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, overwrites: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of gate and up in one pass, that of up over `grad_output` if that may be overwritten."""
    gate, up = gate.contiguous(), up.contiguous()
    is_written_over = overwrites and grad_output.is_contiguous()
    grad_output = grad_output.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), grad_output if is_written_over else torch.empty_like(up)
    with torch.cuda.device_of(gate):
        _gradients_kernel[(num_tiles(gate.numel(), BLOCK),)](
            grad_output, gate, up, grad_gate, grad_up, gate.numel(),
            ACTIVATION=activation, BLOCK=BLOCK, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return grad_gate, grad_up


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]  # Triton reads annotations as code.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return act(x) and its slope, in fp32."""
    if ACTIVATION == "silu":
        share = _sigmoid(x)
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 (1 + tanh z) is the sigmoid of 2 z.
        share = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * share
        slope = share + x * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x))
    return value, slope


@triton.jit
def _product_kernel(gate, up, out, total, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # In 64 bits: there may be more than 2^31 values.
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    dtype = out.dtype.element_ty
    value, _ = _activate(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (value.to(dtype).to(tl.float32) * other).to(dtype), mask=inside)


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    grad_output, gate, up, grad_gate, grad_up, total, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < total
    dtype = grad_gate.dtype.element_ty
    value, slope = _activate(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + place, mask=inside, other=0.0).to(tl.float32)
    grad_value = (grad * other).to(dtype).to(tl.float32)
    tl.store(grad_gate + place, (grad_value * slope).to(dtype), mask=inside)
    tl.store(grad_up + place, (value.to(dtype).to(tl.float32) * grad).to(dtype), mask=inside)
