"""Kernels of Triton compiled as their launchers launch them, for GPUs that are not there.

A launcher is called with tensors on the meta device, and what it would launch is recorded: kernel, grid, arguments and
options. Triton's own code then decides what a GPU would: which arguments are constants, which are multiples of 16, and
how they are compiled. The code is read with the `cuobjdump` in Triton's package.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

CAPABILITIES = (80, 86, 89, 90, 100, 120)
WARP_THREADS = 32


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a GPU.

    Attributes:
        name: Name of the kernel.
        threads: Number of threads that are launched.
        registers: Number of registers of a thread.
        spilled: Bytes of a thread that are in memory for want of registers.
        ptx: The intermediate code.
        cubin: The code of the GPU.
    """

    name: str
    threads: int
    registers: int
    spilled: int
    ptx: str
    cubin: bytes

    def instructions(self) -> list[str]:
        """Return the names of the GPU's instructions that a thread comes to, without their modifiers."""
        lines = _cuobjdump(self.cubin, "-sass")
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", lines, re.MULTILINE)
        # The code ends in a jump to itself and in instructions that do nothing.
        return [name for name in names if name != "NOP"][:-1]


class _Gpu:
    """Stands for Triton's driver of a GPU of a capability, of which it is asked only what the code is compiled for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, WARP_THREADS)

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """Stands for a kernel, and records its launches instead."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self._launches.append((self._kernel, grid, args, options))


def can_compile() -> bool:
    """Return whether Triton and its tool are installed."""
    return find_spec("triton") is not None and _tool().exists()


def compile_launches(module: ModuleType, call: Callable[[ModuleType], object], capability: int) -> list[Compiled]:
    """Compile what a launcher launches.

    Args:
        module: Module with the kernels and their launcher.
        call: Calls the launcher of the module, on the meta device.
        capability: Compute capability, such as 89.
    """
    import triton

    launches: list[Any] = []
    with ExitStack() as stack:
        for name, value in vars(module).copy().items():
            if isinstance(value, triton.JITFunction):
                stack.enter_context(mock.patch.object(module, name, _Recorder(value, launches)))
        call(module)
    assert launches, "nothing was launched"
    driver = triton.runtime.driver
    before = dict(vars(driver))  # its own reset looks for a GPU
    driver.set_active(_Gpu(capability))
    try:
        return [_compile(*launch) for launch in launches]
    finally:
        vars(driver).update(before)


def _compile(kernel: Any, grid: tuple[int, ...], args: Any, options: Any) -> Compiled:
    compiled = kernel.warmup(*args, grid=(1,), **options)
    cubin, metadata = compiled.asm["cubin"], compiled.metadata
    usage = _cuobjdump(cubin, "-res-usage")
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    threads = prod(grid) * WARP_THREADS * metadata.num_warps
    return Compiled(metadata.name, threads, registers, stack + local, compiled.asm["ptx"], cubin)


def _cuobjdump(cubin: bytes, option: str) -> str:
    """Return what CUDA's tool says about a GPU's code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(), option, file.name], capture_output=True, text=True, check=True).stdout


def _tool() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
