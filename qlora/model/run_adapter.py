"""Whether an adapter is the one that its run trained."""

import math
from typing import Any

from qlora.checkpoint import PeftAdapter, RunDirectory, read_adapter
from qlora.config import RunConfig, load_config
from qlora.errors import CheckpointError
from qlora.files import BaseFiles
from qlora.lora.experts import rank_of_experts, specs_with_rank
from qlora.lora.mixture import expert_stacks
from qlora.model.formats import expert_type
from qlora.model.from_config import adapter_spec, base_files
from qlora.model.skeleton import build_skeleton
from qlora.nf4 import NF4


def read_run_adapter(run: RunDirectory) -> PeftAdapter:
    """Read a run's adapter, and check its layers, scalings and trained rows against the run's config and record.

    Raises:
        CheckpointError: The adapter is damaged, or another run's; names all mismatches.
    """
    adapter, parameters = read_adapter(run.adapter), run.read_record().parameters
    config = load_config(run.config)
    spec = adapter_spec(config.lora)
    specs = spec.by_layer(parameters.adapted, others=parameters.adapted_experts)
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
    for name, rank in parameters.adapted_experts.items():
        specs |= specs_with_rank(spec, [name], _expert_rank(config, rank), {name: rank})
    found_scalings = {name: own.scaling for name, own in adapter.layers.items()}
    found_scalings |= {name: own.scaling for name, own in adapter.experts.items()}
    scalings = {name: (found_scalings[name], specs[name].scaling) for name in specs if name in found_scalings}
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


def check_experts_as_trained(run: RunDirectory, files: BaseFiles, skeleton: Any) -> None:
    """Check, before a base is loaded, that its experts were in the same 4 bits in training as they will be now.

    Args:
        run: The run.
        files: The base's files.
        skeleton: The base without weights.

    Raises:
        CheckpointError: A version of qlora that left them in 16 bits, or had other codes, trained the run.
    """
    record = run.read_record()
    others = [name for name in expert_stacks(skeleton) if name not in record.parameters.quantized]
    if others and record.quantization.kind != "none":
        raise CheckpointError(
            f"{run.path} was trained by qlora {record.versions.get('qlora', '0.1.0')} with experts in 16 bits "
            f"({others[0]}), which are in 4 bits now; continue or run it with that version, merge it with this one, or "
            "train again."
        )
    check_expert_type(run, files)


def check_expert_type(run: RunDirectory, files: BaseFiles) -> None:
    """Check that a base's experts have the values that a run was trained on.

    Args:
        run: The run.
        files: The base's files, those that the run was trained on.

    Raises:
        CheckpointError: A version of qlora that had them in codes of another type trained the run.
    """
    record = run.read_record()
    trained, now = record.quantization.experts or NF4, expert_type(files)
    if trained == now or record.quantization.kind == "none":
        return
    skeleton = build_skeleton(files, load_config(run.config).model.trust_remote_code, record.head)
    if names := [name for name in expert_stacks(skeleton) if name in record.parameters.quantized]:
        raise CheckpointError(
            f"{run.path} was trained by qlora {record.versions.get('qlora', '0.1.0')} with experts in {trained} "
            f"({names[0]}), which are in {now} now and have other values; continue, run or merge it with that version, "
            "or train again."
        )


def _expert_rank(config: RunConfig, trained: int) -> int:
    """Return a rank of experts that gives a stack the scaling of training: the config's, which alpha is divided by.

    A stack that started from an adapter may have a higher one, and the config's may follow from the base, which is read
    only where it matters.

    Args:
        config: Config of the run.
        trained: Rank that the stack was trained with.
    """
    if config.lora.start_from is None or not config.lora.alpha_pattern:
        return trained
    skeleton = build_skeleton(base_files(config.model, with_weights=False), config.model.trust_remote_code)
    return rank_of_experts(config.lora.expert_rank, config.lora.rank, skeleton)


def _show(ids: range) -> str:
    return f"the ids {ids.start} to {ids.stop - 1}" if ids else "no ids"
