"""Every kernel, as its launcher launches it, compiled for GPUs: registers, spills, instructions and how it rounds.

The interpreter, which the other tests of kernels use, does not show that a kernel compiles, uses tensor cores, has
enough registers and fuses no two operations. A kernel is one line of `LAUNCHES`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import pytest
import torch

from qlora.kernels import ExpertGroup
from scripts.dev.bench.launched import CAPABILITIES, compile_launches
from tests.combinations import each
from tests.interpreted import needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]

BF16, FP16 = torch.bfloat16, torch.float16
WIDE, RAGGED = (4096, 4096), (1024, 172)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dequantized(
    shape: tuple[int, int], dtype: torch.dtype = BF16, rank: int = 0, experts: int = 0, is_nested: bool = True
) -> Callable[[ModuleType], object]:
    """Return a call that dequantizes a weight, or some of a stack of experts, with a LoRA term of a rank."""
    stack, size = (experts,) * bool(experts), shape[0] * shape[1]
    blocks = size // 64
    options: dict[str, object] = {"index": meta(3, dtype=torch.int64)} if experts else {}
    if is_nested:
        options |= {"nested_code": meta(256), "nested_absmax": meta(*stack, -(-blocks // 256))}
        options |= {"nested_offset": meta(*stack)}
    if rank:
        A, B = (meta(*stack, *each, dtype=dtype) for each in ((rank, shape[1]), (shape[0], rank)))
        options |= {"lora_A": A, "lora_B": B, "scaling": 2.0}
    packed = meta(*stack, size // 2, dtype=torch.uint8)
    absmax = meta(*stack, blocks, dtype=torch.uint8 if is_nested else torch.float32)
    return lambda module: module.dequantize_4bit_triton(packed, meta(16), absmax, shape, dtype, **options)


def multiplied(
    features: int, depth: int = 2048, dtype: torch.dtype = BF16, of_group: bool = False, has_bias: bool = False
) -> Callable[[ModuleType], object]:
    """Return a call that multiplies the rows of three of eight experts by their matrices."""
    weights = meta(3 if of_group else 8, features, depth, dtype=dtype)
    bias = meta(8, features, dtype=dtype) if has_bias else None
    x = meta(300, depth, dtype=dtype)
    return lambda module: module.grouped_matmul_triton(x, weights, group(), bias=bias, of_group=of_group)


def outer(left: int, right: int, dtype: torch.dtype = BF16) -> Callable[[ModuleType], object]:
    """Return a call that sums the products of two features over the rows of each of three experts."""
    tensors = meta(300, left, dtype=dtype), meta(300, right, dtype=dtype)
    out = meta(8, left, right, dtype=dtype)
    return lambda module: module.grouped_outer_triton(*tensors, group(), out, 0.5)


def losses(size: int, dtype: torch.dtype = BF16, softcap: float | None = None) -> Callable[[ModuleType], object]:
    """Return a call that computes losses of a vocabulary of a size, and the gradient of their logits."""
    logits, labels, weights = meta(512, size, dtype=dtype), meta(512, dtype=torch.int64), meta(512)
    options = (0.5, softcap, weights, 0.1, softcap is not None, True)
    return lambda module: module.token_losses_triton_(logits, labels, *options)


def normed(features: int, dtype: torch.dtype = BF16, is_gradient: bool = False) -> Callable[[ModuleType], object]:
    """Return a call that norms rows of a number of features, or computes the gradient of that."""
    x, weight = meta(512, features, dtype=dtype), meta(features, dtype=dtype)
    if is_gradient:
        return lambda module: module.rms_norm_gradient_triton(x, x, weight, 1e-5, 0.0)
    return lambda module: module.rms_norm_triton(x, weight, 1e-5, 0.0, True)


def gated(activation: str, dtype: torch.dtype = BF16, is_gradient: bool = False) -> Callable[[ModuleType], object]:
    """Return a call that computes a gated product, or its gradients in place."""
    x = meta(512, 14_336, dtype=dtype)
    if is_gradient:
        return lambda module: module.gated_gradients_triton(activation, x, x, x, True)
    return lambda module: module.gated_product_triton(activation, x, x)


def rotated(is_backward: bool, dtype: torch.dtype = BF16) -> Callable[[ModuleType], object]:
    """Return a call that rotates queries and keys, or turns their gradients back."""
    query, key, angles = (
        meta(1, 512, 32, 128, dtype=dtype),
        meta(1, 512, 8, 128, dtype=dtype),
        meta(1, 512, 128, dtype=dtype),
    )
    return lambda module: module.rotate_triton(query, key, angles, angles, is_backward)


def group() -> ExpertGroup:
    index, bounds = meta(3, dtype=torch.int64), meta(9, dtype=torch.int64)
    return ExpertGroup([1, 4, 5], [0, 100, 200, 300], index, bounds)


@dataclass(frozen=True)
class Launch:
    """A call of a launcher, and what its kernels should be compiled to.

    Attributes:
        module: Module of `qlora.kernels`.
        call: Calls the launcher with the module.
        most_registers: Largest number of registers of a thread; 255 is the hardware's limit.
        most_spilled: Largest number of bytes that a thread keeps in memory for want of registers.
        has_products: Whether tensor cores are used.
        is_exact: Whether no addition may be contracted with a multiplication, which would round once instead of twice.
        most_instructions: Largest number of instructions of a thread; docs/benchmarks/instructions.md has them by
            version of Triton.
    """

    module: str
    call: Callable[[ModuleType], object]
    most_registers: int
    most_spilled: int = 0
    has_products: bool = True
    is_exact: bool = False
    most_instructions: int | None = None


def plain(call: Callable[[ModuleType], object], per_weight: int = 9) -> Launch:
    bounds = {"most_registers": 72, "most_instructions": per_weight * 32}  # weights of a thread
    return Launch("dequantize_triton", call, **bounds, has_products=False, is_exact=True)


def with_lora(call: Callable[[ModuleType], object], most_registers: int = 168, per_weight: int = 18) -> Launch:
    return Launch("dequantize_triton", call, most_registers, is_exact=True, most_instructions=per_weight * 64)


def of_logits(call: Callable[[ModuleType], object]) -> Launch:
    # Four programs of eight warps on each multiprocessor.
    return Launch("cross_entropy_triton", call, most_registers=64, has_products=False)


def grouped(call: Callable[[ModuleType], object]) -> Launch:
    return Launch("grouped_triton", call, most_registers=224)  # two programs of four warps on each multiprocessor


def elementwise(module: str, call: Callable[[ModuleType], object], most_registers: int = 64, **own: bool) -> Launch:
    return Launch(f"{module}_triton", call, most_registers, has_products=False, **own)


LAUNCHES = {
    "norm": elementwise("norm", normed(4096)),
    "norm, long rows": elementwise("norm", normed(16_384), 128),
    "norm's gradient": elementwise("norm", normed(4096, is_gradient=True)),
    "norm's gradient, heads": elementwise("norm", normed(128, is_gradient=True)),
    "norm's gradient, fp32": elementwise("norm", normed(4096, torch.float32, is_gradient=True)),
    "norm's gradient, long rows": elementwise("norm", normed(16_384, is_gradient=True), 128),
    "SwiGLU": elementwise("gated", gated("silu")),
    "SwiGLU's gradients": elementwise("gated", gated("silu", is_gradient=True)),
    "GeGLU": elementwise("gated", gated("gelu_tanh")),
    "GeGLU's gradients": elementwise("gated", gated("gelu_tanh", is_gradient=True)),
    "GeGLU's gradients by erf": elementwise("gated", gated("gelu", is_gradient=True)),
    "rotation": elementwise("rotary", rotated(False), is_exact=True),
    "rotation's gradient": elementwise("rotary", rotated(True), is_exact=True),
    "rotation's gradient, fp32": elementwise("rotary", rotated(True, torch.float32), is_exact=True),
    "dequantize": plain(dequantized(WIDE)),
    "dequantize, fp16": plain(dequantized(WIDE, FP16)),
    "dequantize, fp32": plain(dequantized(WIDE, torch.float32), per_weight=13),
    "dequantize, absmax in fp32": plain(dequantized(WIDE, is_nested=False)),
    "dequantize, experts": plain(dequantized((1024, 2048), experts=8), per_weight=10),
    "fold rank 8": with_lora(dequantized(WIDE, rank=8)),
    "fold rank 16": with_lora(dequantized(WIDE, rank=16)),
    "fold rank 16, fp16": with_lora(dequantized(WIDE, FP16, rank=16)),
    "fold rank 32": with_lora(dequantized(WIDE, rank=32)),
    "fold rank 64": with_lora(dequantized(WIDE, rank=64)),
    "fold rank 8, experts": with_lora(dequantized((1024, 2048), rank=8, experts=8), per_weight=19),
    # Its rows are no whole words of codes, and each weight has an absmax of its own.
    "fold rank 16, ragged": with_lora(dequantized(RAGGED, rank=16), most_registers=255, per_weight=36),
    "fold rank 16, no whole tiles": with_lora(dequantized((1024, 4304), rank=16), per_weight=20),
    "losses": of_logits(losses(128_256)),
    "losses, fp16": of_logits(losses(128_256, FP16)),
    "losses with a soft cap": of_logits(losses(256_000, softcap=30.0)),
    "losses, ragged": of_logits(losses(50_257)),
    "experts' weights": grouped(multiplied(1024, of_group=True)),
    "experts' weights, fp16": grouped(multiplied(1024, dtype=FP16, of_group=True)),
    "experts' weights with bias": grouped(multiplied(1024, of_group=True, has_bias=True)),
    "experts' factors": grouped(multiplied(8)),
    "experts' factors, ragged": grouped(multiplied(8, depth=172)),
    "gradients of experts' factors": grouped(outer(8, 2048)),
}


# Each kernel for one GPU, and each GPU with one of the kernels that add a LoRA term; with QLORA_SWEEP=1 all for all.
# Older GPUs have no bf16.
@pytest.mark.parametrize(("name", "capability"), [*each([*LAUNCHES], CAPABILITIES), ("dequantize, fp16", 75)])
def test_the_kernel_compiles_within_the_registers(name, capability):
    launch = LAUNCHES[name]
    for kernel in compile_launches(import_module(f"qlora.kernels.{launch.module}"), launch.call, capability):
        print(f"{name}, sm_{capability}: {kernel.name} with {kernel.registers} registers")
        assert kernel.spilled <= launch.most_spilled
        assert kernel.registers <= launch.most_registers
        assert ("mma" in kernel.ptx) == launch.has_products
        if launch.has_products and capability < 100:  # whose products don't name the dtype of their sum
            assert re.search(r"mma\S*\.f32\.(bf16|f16)\.", kernel.ptx)
        if launch.is_exact:
            instructions = kernel.instructions()
            assert instructions, "none were found in what cuobjdump prints"
            assert not any(name.startswith("FFMA") for name in instructions)  # FFMA2 computes two of them
            if name.startswith("dequantize"):  # elsewhere, bf16 on older GPUs is multiplied by operations that add -0
                assert "fma" not in kernel.ptx
            assert "cvt.rz." not in kernel.ptx
            print(f"  {len(instructions)} instructions")
            assert launch.most_instructions is None or len(instructions) <= launch.most_instructions
