"""The record of a run at its start, with versions and hardware."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from qlora.about import __version__
from qlora.checkpoint import BaseRecord, ExampleCounts, Quantization, RunRecord
from qlora.files import BaseFiles
from qlora.model import BITSANDBYTES_4BIT, weight_format
from qlora.nf4 import NF4Experts, NF4Linear
from qlora.training.plan import Assembly
from qlora.training.resume import Start

PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "datasets", "safetensors")


def make_record(assembly: Assembly, start: Start) -> RunRecord:
    """Return the record of a run at the start of a session."""
    config, files, plan = assembly.config, assembly.files, assembly.plan
    return RunRecord(
        versions=package_versions(),
        hardware=describe_hardware(),
        seed=config.train.seed,
        base=BaseRecord(config.model.base, config.model.revision, files.commit, files.fingerprint()),
        quantization=_describe_quantization(assembly.model, files),
        total_steps=plan.total_steps,
        in_use=plan.in_use,
        continued_from=str(start.checkpoint) if start.checkpoint else None,
        started_from=start.started_from,
        final_step=start.final_step,
        parameters=plan.inventory,
        data=[report.as_dict() for report in plan.datasets.reports],
        examples=ExampleCounts(len(plan.datasets.train), len(plan.datasets.eval)),
        held_out={name: len(examples) for name, examples in plan.datasets.held_out.items()},
        retain=[report.as_dict() for report in plan.datasets.retain_reports],
        head=assembly.head,
        status="running",
        stopped_early=None if start.record is None else start.record.stopped_early,
    )


def _describe_quantization(model: nn.Module, files: BaseFiles) -> Quantization:
    states = (module.quant_state for module in model.modules() if isinstance(module, NF4Linear))
    state = next(states, None)
    of_experts = (module.quant_type for module in model.modules() if isinstance(module, NF4Experts))
    return Quantization(
        kind="none" if state is None else state.quant_type,
        double_quant=state is not None and state.nested,
        block_size=None if state is None else state.blocksize,
        from_4bit_checkpoint=weight_format(files) == BITSANDBYTES_4BIT,
        experts=next(of_experts, None),
    )


def package_versions() -> dict[str, str]:
    """Return the versions of Python, qlora and the packages that a run's numbers depend on."""
    # The metadata of PyPI's torch lacks the build, such as +cu130.
    packages = {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__}
    return {"python": platform.python_version(), "qlora": __version__} | packages


def describe_hardware() -> dict[str, Any]:
    """Return the processor, and the GPUs by name and memory."""
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
