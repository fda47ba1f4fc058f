"""Whether an adapter is the one that its run trained."""

import math
from typing import Any

from qlora.checkpoint import PeftAdapter, RunDirectory, read_adapter
from qlora.config import load_config
from qlora.errors import CheckpointError
from qlora.model.from_config import adapter_spec
from qlora.nf4 import NF4Experts


def read_run_adapter(run: RunDirectory) -> PeftAdapter:
    """Read a run's adapter, and check its layers, scalings and trained rows against the run's config and record.

    Raises:
        CheckpointError: The adapter is damaged, or another run's; names all mismatches.
    """
    adapter, parameters = read_adapter(run.adapter), run.read_record().parameters
    specs = adapter_spec(load_config(run.config).lora).by_layer(parameters.adapted, others=parameters.adapted_experts)
    problems = []
    if differing := sorted({*adapter.layers} ^ {*specs}):
        problems.append(f"adapter and run differ in {len(differing)} modules: {', '.join(differing[:4])} …")
    if differing := sorted({*adapter.experts} ^ {*parameters.adapted_experts}):
        problems.append(f"adapter and run differ in {len(differing)} stacks of experts: {', '.join(differing[:4])} …")
    problems += [
        f"{name} has experts of rank {own.A.shape[1]}, the run trained with {parameters.adapted_experts[name]}"
        for name, own in adapter.experts.items()
        if parameters.adapted_experts.get(name, own.A.shape[1]) != own.A.shape[1]
    ]
    scalings = {name: (adapter.layers[name].scaling, specs[name].scaling) for name in specs if name in adapter.layers}
    scaled = [name for name, (found, trained) in scalings.items() if not math.isclose(found, trained)]
    if scaled:
        found, trained = scalings[scaled[0]]
        others = f", and {len(scaled) - 1} other layers have other ones too" if scaled[1:] else ""
        problems.append(f"{scaled[0]} has a scaling of {found:g}, the run trained with {trained:g}{others}")
    trained_rows = {name: range(*ids) for name, ids in parameters.trained_rows.items()}
    stored = {name: rows.ids for name, rows in adapter.rows.items()}
    if stored and parameters.shared_rows:  # PEFT stores rows by ids of a tied weight once
        stored = {name: stored.get(name, next(iter(stored.values()))) for name in {*stored, *trained_rows}}
    for name in sorted({*stored} | {*trained_rows}):
        own, given = trained_rows.get(name, range(0)), stored.get(name, range(0))
        if own != given:
            problems.append(f"the adapter has rows of {name} for {_show(given)}, the run for {_show(own)}")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{run.adapter} is not the adapter that its run trained; use the run's own:\n{lines}")
    return adapter


def check_experts_as_trained(run: RunDirectory, model: Any) -> None:
    """Check that the experts of a base are in 4 bits if they were in training.

    Raises:
        CheckpointError: A version of qlora that left them in 16 bits trained the run.
    """
    record = run.read_record()
    trained = {*record.parameters.quantized}
    here = [name.removesuffix(".base") for name, module in model.named_modules() if isinstance(module, NF4Experts)]
    others = [name for name in here if name not in trained]
    if others:
        raise CheckpointError(
            f"{run.path} was trained by qlora {record.versions.get('qlora', '0.1.0')} with experts in 16 bits "
            f"({others[0]}), which are in 4 bits now; continue or run it with that version, or train again."
        )


def _show(ids: range) -> str:
    return f"the ids {ids.start} to {ids.stop - 1}" if ids else "no ids"
