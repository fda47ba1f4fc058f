"""What run.json says of where a run came from."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from qlora.about import __version__
from qlora.config import RunConfig
from qlora.files import BaseFiles
from qlora.model import BITSANDBYTES_4BIT, weight_format
from qlora.nf4 import NF4Linear

PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "datasets", "safetensors")


def describe_run(config: RunConfig, files: BaseFiles, model: nn.Module) -> dict[str, Any]:
    """Versions, hardware, the base's fingerprint, and how it is quantized."""
    states = (module.quant_state for module in model.modules() if isinstance(module, NF4Linear))
    state = next(states, None)
    return {
        "versions": package_versions(),
        "hardware": describe_hardware(),
        "seed": config.train.seed,
        "base": {
            "name": config.model.base,
            "revision": config.model.revision,
            "commit": files.commit,
            "files": files.fingerprint(),
        },
        "quantization": {
            "kind": "none" if state is None else state.quant_type,
            "double_quant": state is not None and state.nested,
            "block_size": None if state is None else state.blocksize,
            "from_4bit_checkpoint": weight_format(files) == BITSANDBYTES_4BIT,
        },
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python, qlora and the packages that a run's numbers depend on."""
    # torch names its build by itself alone: PyPI's has no +cu… in its metadata.
    packages = {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__}
    return {"python": platform.python_version(), "qlora": __version__} | packages


def describe_hardware() -> dict[str, Any]:
    """The processor, and the GPUs by name and memory."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
