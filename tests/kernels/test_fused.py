"""Kernels of norms, gated products and rotations, compiled for GPUs that are not there, and where they are used."""

import pytest
import torch

from qlora.kernels import ACTIVATIONS, unfused_reason
from tests.interpreted import CAPABILITIES, compile_for, needs_triton, registers_and_spills

SIZES = ("num_rows", "features", "total", "num_angles", "num_queries", "num_keys", "half")


def compiled(capability, dtype):
    """Yield the name and the registers and spills of each kernel as it is launched."""
    from qlora.kernels import gated_triton, norm_triton, rotary_triton

    tensors = ("x", "weight", "out", "grad_output", "gate", "up", "grad_gate", "grad_up")
    tensors += ("query", "key", "cos", "sin", "query_out", "key_out")
    types = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(SIZES, "i32") | {"eps": "fp32", "offset": "fp32"}

    def build(kernel, constants, options):
        return registers_and_spills(compile_for(kernel, types, constants, capability, options))

    for features in (128, 4096, norm_triton.MOST_FEATURES):
        rows, columns, warps = norm_triton.tile_of(features)
        tile, options = {"ROWS": rows, "COLUMNS": columns}, {"num_warps": warps, **norm_triton.LAUNCH_OPTIONS}
        yield f"norm {features}", build(norm_triton._norm_kernel, tile | {"ROUNDS_FIRST": True}, options)
        yield f"norm gradient {features}", build(norm_triton._norm_gradient_kernel, tile, options)
    for activation in ACTIVATIONS:
        constants = {"ACTIVATION": activation, "BLOCK": gated_triton.BLOCK}
        yield activation, build(gated_triton._product_kernel, constants, gated_triton.LAUNCH_OPTIONS)
        yield f"{activation} gradients", build(gated_triton._gradients_kernel, constants, gated_triton.LAUNCH_OPTIONS)
    tile = {"ROWS": rotary_triton.TILE // 64, "COLUMNS": 64}
    for is_backward in (False, True):
        constants = tile | {"BACKWARD": is_backward}
        yield "rotary", build(rotary_triton._rotary_kernel, constants, rotary_triton.LAUNCH_OPTIONS)


# The interpreter shows neither that the kernels compile nor that their registers suffice.
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_without_spills(capability, dtype):
    found = dict(compiled(capability, dtype))
    print(capability, dtype, {name: registers for name, (registers, _) in found.items()})
    assert not {name: spilled for name, (_, spilled) in found.items() if spilled}


def test_they_are_for_cuda_and_triton(monkeypatch):
    assert unfused_reason(torch.device("cpu")) == "the fused kernels are for CUDA"
    monkeypatch.setattr("qlora.kernels.fused.HAS_TRITON", False)
    assert unfused_reason(torch.device("cuda")) == "Triton is not installed"
    monkeypatch.setattr("qlora.kernels.fused.HAS_TRITON", True)
    assert unfused_reason(torch.device("cuda")) is None
