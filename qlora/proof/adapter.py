"""Verify an adapter without a merge: its files against the run, its layers against weights computed a second time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora.checkpoint import RunDirectory, read_adapter, step_of
from qlora.checkpoint.peft_folder import WEIGHTS_FILE, read_adapter_header
from qlora.config import load_config
from qlora.data import collate
from qlora.data.tokens import TokenizedExample
from qlora.errors import CheckpointError
from qlora.lora import LoraLinear, lora_layers
from qlora.lora.mixture import expert_layers
from qlora.lora.spec import COMPUTED_INITS
from qlora.model import adapter_spec
from qlora.model.loss import model_inputs
from qlora.proof.expected import ExpectedWeights
from qlora.proof.experts import expert_outputs

# Number of tokens that the model is run on; each layer's product with them is computed a second time in fp64.
NUM_TOKENS = 128
# Roundings that follow one another in an expert's output: of inputs, both weights, both products, gate, score and sum.
EXPERT_ROUNDINGS = 8


@dataclass(slots=True)
class LayerCheck:
    """The result of :func:`check_layers`.

    Attributes:
        problems: A line for each mismatch.
        checked: Number of layers that were compared.
        max_difference: Largest relative difference of a layer's outputs from the expected ones.
    """

    problems: list[str] = field(default_factory=list)
    checked: int = 0
    max_difference: float = 0.0


def check_adapter_files(run: RunDirectory) -> list[str]:
    """Check an adapter's layers, ranks and scalings against the run's, and its values against the last checkpoint's.

    Returns:
        A line for each mismatch.
    """
    parameters = run.read_record().parameters
    section = load_config(run.config).lora
    specs = adapter_spec(section).by_layer(parameters.adapted, others=parameters.adapted_experts)
    # These change ranks, and add terms that are stored with the trained one.
    has_own_ranks = section.final_rank or section.start_from or section.init in COMPUTED_INITS
    layers = read_adapter(run.adapter).layers
    problems = [f"{run.adapter} lacks the factors of {name}" for name in sorted({*specs} - {*layers})]
    problems += [f"{run.adapter} has factors of {name}, which has no adapter" for name in sorted({*layers} - {*specs})]
    others: dict[tuple[float, float], list[str]] = {}
    for name, spec in specs.items():
        if name not in layers:
            continue
        rank, scaling = len(layers[name].A), layers[name].scaling
        if rank != spec.rank and not has_own_ranks:
            problems.append(f"{run.adapter}: {name} has rank {rank}, the run trained with {spec.rank}")
        if not math.isclose(spec.scaling, scaling):
            others.setdefault((scaling, spec.scaling), []).append(name)
    problems += [
        f"{run.adapter} has a scaling of {found:g}, the run trained with {own:g}, in {len(names)} layers: "
        f"{', '.join(names[:3])}{' …' * (len(names) > 3)}"
        for (found, own), names in others.items()
    ]
    checkpoints = run.list_checkpoints()
    if checkpoints and checkpoints[-1] != run.adapter and step_of(checkpoints[-1]) == run.step:
        problems += _compare_saved(checkpoints[-1], run.adapter)
    return problems


def _compare_saved(checkpoint: Path, adapter: Path) -> list[str]:
    try:
        read_adapter_header(checkpoint)
    except CheckpointError as error:
        return [
            f"the adapter can't be compared with the last checkpoint: {error} Remove that checkpoint if the run no "
            "longer needs it."
        ]
    saved, found = (load_file(folder / WEIGHTS_FILE) for folder in (checkpoint, adapter))
    return [
        f"{adapter}: {name} differs from the checkpoint of the last step"
        for name in sorted({*saved} & {*found})
        if not torch.equal(saved[name], found[name])
    ]


@torch.no_grad()
def check_layers(model: Any, expected: ExpectedWeights, examples: Sequence[TokenizedExample]) -> LayerCheck:
    """Run a model on a few tokens, and compare each adapted layer's output with x (W + scaling · B A)ᵀ.

    Layers of experts are computed as a whole, with these weights of each expert.

    Each layer is compared for its own inputs, so that an error is reported only for the layer that causes it, and no
    second model is needed.

    Args:
        model: Model with adapters.
        expected: Weights that the model was trained on, with the updates.
        examples: Examples to take the tokens from.
    """
    check = LayerCheck()
    check.problems += [
        f"{name} was not compared: its weight is not a tensor of its own in the base's files"
        for name in expected.unplaced
    ]

    def compare(name: str, layer: LoraLinear, x: torch.Tensor, y: torch.Tensor) -> None:
        base, update = expected.adapted(name)
        eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, expected.compute_dtype))
        x, y = x.flatten(0, -2).double().cpu(), y.flatten(0, -2).double().cpu()
        update_output = x @ update.T
        wanted = x @ base.T + update_output
        if layer.base.bias is not None:
            wanted += layer.base.bias.double().cpu()
        # Norm of the errors from rounding each product to the compute dtype, if the roundings are independent; the sums
        # and the two factors' roundings get as much, twice.
        noise = (x.square() @ base.square().T).sum().sqrt() + wanted.norm() + update_output.norm()
        judge(name, y, wanted, update_output, 4 * eps * noise.item())

    def compare_experts(name: str, layer: Any, inputs: Any, y: torch.Tensor) -> None:
        wanted, without, size = expert_outputs(name, layer, expected.experts, inputs)
        eps = max(torch.finfo(dtype).eps for dtype in (y.dtype, expected.compute_dtype))
        judge(name, y.flatten(0, -2).double().cpu(), wanted, wanted - without, EXPERT_ROUNDINGS * eps * size)

    def judge(name: str, y: torch.Tensor, wanted: torch.Tensor, update_output: torch.Tensor, bound: float) -> None:
        """Add what an output differs by from the wanted one, beyond a bound on what rounding explains."""
        error = y - wanted
        share = ((error * update_output).sum() / update_output.square().sum().clamp_min(1e-30)).item()
        significant = 16 * bound / math.sqrt(error.numel())
        check.checked += 1
        check.max_difference = max(check.max_difference, (error.norm() / wanted.norm()).item())
        rest = (error - share * update_output).norm().item()
        if not rest <= bound:  # also true for NaN
            check.problems.append(
                f"{name} computes other outputs: their relative difference is {error.norm() / wanted.norm():.2g}"
            )
        elif abs(share) > 0.02 and abs(share) * update_output.norm().item() > significant:
            check.problems.append(f"{name} computes with {round(1 + share, 2) + 0.0:g} times its update")

    handles = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: compare(name, layer, inputs[0], output))
        for name, layer in lora_layers(model)
        if name not in expected.unplaced
    ]
    adapted = {name.rpartition(".")[0] for name in expected.experts.adapted}
    handles += [
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: compare_experts(name, layer, inputs, output)
        )
        for name, layer in expert_layers(model)
        if name in adapted
    ]
    batch = collate([examples[0][:NUM_TOKENS]]).to(model.device)
    try:
        model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return check
