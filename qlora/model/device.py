"""The device and the compute dtype that a model runs in, and the memory of the host."""

import os
from pathlib import Path

import torch

from qlora.dtypes import as_dtype
from qlora.errors import ModelError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device by its name; for `auto` the GPU, or the CPU if there is none.

    Raises:
        ModelError: The device is not available, or cannot compute.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        return found
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"Device '{device}' can't be used here: {str(error).splitlines()[0]}") from None


def resolve_compute_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations and of every weight that is not quantized.

    `auto` is bf16 where the hardware multiplies it, else fp16 on GPUs (with loss scaling) and fp32 on CPUs.

    Raises:
        ModelError: The dtype is unknown.
    """
    if compute_dtype != "auto":
        return as_dtype(compute_dtype, ModelError)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def free_host_bytes() -> int:
    """Return the free bytes of the host, or of the container that this runs in."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: half of the memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    values = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
