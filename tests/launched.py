"""Kernels of Triton compiled as their launchers launch them, for GPUs that are not there.

A launcher is called with tensors on the meta device, and what it would launch is recorded: kernel, arguments, options.
Triton's own code then decides what a GPU would: which arguments are constants, which are multiples of 16, and how they
are compiled.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.interpreted import cuobjdump, registers_and_spills


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU.

    Attributes:
        name: Name of the kernel.
        registers: Number of registers of a thread.
        spilled: Bytes of a thread that are in memory for want of registers.
        ptx: The intermediate code.
        cubin: The code of the GPU.
    """

    name: str
    registers: int
    spilled: int
    ptx: str
    cubin: bytes

    def instructions(self) -> list[str]:
        """Return the names of the GPU's instructions, without their modifiers."""
        lines = cuobjdump(self.cubin, "-sass")
        return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", lines, re.MULTILINE)


class _Gpu:
    """Stands for Triton's driver of a GPU of a capability, of which it is asked only what the code is compiled for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self._launches.append((self._kernel, args, options))


def compile_launches(module: ModuleType, call: Callable[[ModuleType], object], capability: int) -> list[Compiled]:
    """Compile what a launcher launches.

    Args:
        module: Module with the kernels and their launcher.
        call: Calls the launcher of the module, on the meta device.
        capability: Compute capability, such as 89.
    """
    import triton

    launches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in vars(module).copy().items():
            if isinstance(value, triton.JITFunction):
                patch.setattr(module, name, _Recorder(value, launches))
        call(module)
    assert launches, "nothing was launched"
    driver = triton.runtime.driver
    before = dict(vars(driver))  # its own reset looks for a GPU
    driver.set_active(_Gpu(capability))
    try:
        return [_compile(kernel, args, options) for kernel, args, options in launches]
    finally:
        vars(driver).update(before)


def _compile(kernel: Any, args: Any, options: Any) -> Compiled:
    compiled = kernel.warmup(*args, grid=(1,), **options)
    registers, spilled = registers_and_spills(compiled)
    return Compiled(compiled.metadata.name, registers, spilled, compiled.asm["ptx"], compiled.asm["cubin"])
