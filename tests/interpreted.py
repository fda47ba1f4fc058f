"""Triton's kernels in its interpreter, on a CPU, and only counted; and whether they can be compiled."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.kernels import HAS_TRITON
from scripts.dev.bench.launched import can_compile

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install triton")
needs_compiler = pytest.mark.skipif(
    not can_compile(), reason="Triton with its cuobjdump is not installed: pip install triton"
)


def load_interpreted(name: str) -> ModuleType:
    """Return a second copy of a module of kernels, for the interpreter.

    Triton reads the variable when a kernel is defined, so the module that others import stays compiled.
    """
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: pip install triton")
    import triton  # first and compiled, with what is its own

    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    if hasattr(module, "_add"):  # Triton's own sum is known to the interpreter, which else adds one number at a time
        module._add = triton.language.standard._sum_combine
    return module


def interpret(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a module of kernels of `qlora.kernels` interpreted where it is imported from now on."""
    monkeypatch.setitem(sys.modules, f"qlora.kernels.{name}", _interpreted(f"qlora.kernels.{name}"))


_interpreted = cache(load_interpreted)


def use_on_cpu(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, ModuleType]) -> None:
    """Have experts computed as a GPU would compute them, by the kernels of these modules of `qlora.kernels`."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"qlora.kernels.{name}", module)
    monkeypatch.setattr("qlora.kernels.grouped.loop_reason", lambda *_: None)
    monkeypatch.setattr("qlora.nf4.experts.verify_kernel", lambda *_: True)


# Launches of operations that are more than one: zeros and a copy; FlashAttention with a state of its generator; and its
# backward, which has three steps and two sums over the query heads of a key head.
SEVERAL = {
    "slice_backward": 2,
    "select_backward": 2,
    "torch_attn::_varlen_attn": 2,
    "torch_attn::_varlen_attn_backward": 5,
}


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel on a GPU.

    Attributes:
        counts: Number of launches by name.
    """

    active: list["Launches"] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __enter__(self) -> "Launches":
        """Count from here."""
        self.active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Count no longer."""
        self.active.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        name = func._schema.name.removeprefix("aten::")
        moves_nothing = func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))
        if not moves_nothing:
            self.counts[name] += SEVERAL.get(name, 1)
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Number of launches."""
        return self.counts.total()


def counted_kernel(name: str) -> Any:
    """Return what stands for a kernel: it computes nothing, and :class:`Launches` counts it by this name."""

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: Launches.active[-1].counts.update([name])

    return Kernel()


def random_groups(num_experts: int, most_rows: int, generator: torch.Generator) -> list[int]:
    """Return where the rows of each expert begin, and the end: some have none, and one has just one."""
    counts = torch.randint(0, most_rows + 1, (num_experts,), generator=generator)
    counts[torch.randint(0, num_experts, (num_experts // 3,), generator=generator)] = 0
    counts[int(torch.randint(0, num_experts, (1,), generator=generator))] = 1
    return [0, *counts.cumsum(0).tolist()]
