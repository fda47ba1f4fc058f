"""Adapters in PEFT's format, with only the keys that all tools read: saved, and loaded into a model."""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from qlora.checkpoint.adapter_experts import (
    KEY,
    copy_experts,
    end_of_stack,
    experts_problems,
    experts_targets,
    experts_tensors,
    linear_parameters,
)
from qlora.checkpoint.adapter_rows import (
    load_rows,
    rows_config,
    rows_problems,
    rows_tensors,
    wrap_stored_rows,
)
from qlora.checkpoint.peft_folder import (
    CONFIG_FILE,
    SCORER_TASK,
    WEIGHTS_FILE,
    PeftAdapter,
    config_alpha,
    read_adapter,
    tensor_names,
)
from qlora.errors import CheckpointError
from qlora.lora import (
    AdapterSpec,
    LoraLinear,
    StoredAdapter,
    StoredExperts,
    linear_layers,
    lora_experts,
    lora_layers,
    output_head,
    reads_images,
    scores_documents,
    text_part,
    wrap_experts,
    wrap_layers,
)
from qlora.lora.spec import matches


def save_adapter(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a folder.

    Only the keys that PEFT, vLLM and llama.cpp need are written, because some tools refuse unknown keys. The scaling is
    written as alpha / rank even with rsLoRA, because llama.cpp silently ignores other scalings. Layers whose rank or
    alpha is not the most common one are listed by name in `rank_pattern` and `alpha_pattern`.

    Args:
        model: Model with adapters.
        folder: Folder, which is created if it is absent.
        base_name: Folder or hub id of the base, for the adapter's config.

    Raises:
        CheckpointError: The model has no adapters.
    """
    layers, experts = dict(lora_layers(model)), dict(lora_experts(model))
    if not layers and not experts:
        raise CheckpointError(f"{type(model).__name__} has no adapters to save; add some with add_lora.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: layer.stored() for name, layer in layers.items()}
    parameters = linear_parameters(model, layers)
    # By the names that PEFT compares patterns with.
    keys = {name: f"{name}.weight" if name in parameters else name for name in layers}
    ranks = {keys[name]: len(each.A) for name, each in stored.items()}
    ranks |= {name: layer.spec.rank for name, layer in experts.items()}
    scalings = {keys[name]: each.scaling for name, each in stored.items()}
    scalings |= {name: layer.spec.scaling for name, layer in experts.items()}
    # Rounded, because the scaling is a quotient of the alpha.
    alphas = {name: round(scaling * ranks[name], 12) for name, scaling in scalings.items()}
    (rank, rank_pattern), (alpha, alpha_pattern) = _as_patterns(ranks), _as_patterns(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT has no dropout on parameters, and refuses it; it has no effect once an adapter is trained.
        "lora_dropout": 0.0 if parameters or experts else next(iter(layers.values())).spec.dropout,
        "use_rslora": False,
        "target_modules": _target_modules(model, [name for name in layers if name not in parameters]),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    has_magnitude = any(each.magnitude is not None for each in stored.values())
    options: dict[str, Any] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_dora": has_magnitude}
    options[KEY] = [*experts_targets(model), *(f"{name}.weight" for name in parameters)]
    config |= {key: value for key, value in options.items() if value} | rows_config(model)
    tensors = rows_tensors(model) | experts_tensors(model)
    for layer, each in stored.items():
        values = zip(tensor_names(layer, has_magnitude), (each.A, each.B, each.magnitude), strict=False)
        tensors |= {name: value.detach().cpu().contiguous() for name, value in values if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _task(model: nn.Module) -> str | None:
    """Return PEFT's name of what a model is for; it has none for images."""
    if reads_images(model):
        return None
    return SCORER_TASK if scores_documents(model) else "CAUSAL_LM"


def _as_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common of values by layer, and the others by patterns that each match a single layer."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {}
    for name, value in values.items():
        if value != common:
            is_unique = not any(matches(name, other) for other in values if other != name)
            others[name if is_unique else f"^{re.escape(name)}"] = value
    for end in sorted({end for name in others if (end := end_of_stack(name))}):  # a mixture has hundreds of stacks
        own = {name: value for name, value in values.items() if matches(end, name)}
        if own.keys() <= others.keys() and len({*own.values()}) == 1:
            others = {name: value for name, value in others.items() if name not in own} | {
                end: next(iter(own.values()))
            }
    return common, others


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy an adapter's factors and trained rows into a model with the same adapted layers.

    Raises:
        CheckpointError: The adapter's modules, shapes, rows or scalings differ from the model's; names them.
    """
    adapter, layers = read_adapter(folder), dict(lora_layers(model))
    if set(adapter.layers) != set(layers):
        mismatches = sorted(set(adapter.layers) ^ set(layers))
        raise CheckpointError(
            f"{folder}: adapter and model differ in {len(mismatches)} modules: {', '.join(mismatches[:4])} …"
        )
    for name, stored in adapter.layers.items():
        layer = layers[name]
        if stored.A.shape != layer.lora_A.shape or stored.B.shape != layer.lora_B.shape:
            raise CheckpointError(
                f"{folder}: {name} has factors {tuple(stored.A.shape)} and {tuple(stored.B.shape)}, "
                f"the model {tuple(layer.lora_A.shape)} and {tuple(layer.lora_B.shape)}."
            )
        if not math.isclose(stored.scaling, layer.spec.scaling):
            raise CheckpointError(
                f"{folder}: {name} has a scaling of {stored.scaling:g}, the run trained with {layer.spec.scaling:g}."
            )
        _copy(layer, stored)
    experts = dict(lora_experts(model))
    if set(adapter.experts) != set(experts):
        mismatches = sorted(set(adapter.experts) ^ set(experts))
        raise CheckpointError(
            f"{folder}: adapter and model differ in {len(mismatches)} stacks of experts: {', '.join(mismatches[:4])} …"
        )
    for name, own in adapter.experts.items():
        if own.A.shape != experts[name].lora_A.shape or not math.isclose(own.scaling, experts[name].spec.scaling):
            raise CheckpointError(
                f"{folder}: {name} has factors {tuple(own.A.shape)} with a scaling of {own.scaling:g}, the model "
                f"{tuple(experts[name].lora_A.shape)} with {experts[name].spec.scaling:g}."
            )
        copy_experts(experts[name], own)
    load_rows(model, adapter.rows, adapter.tensors)


@torch.no_grad()
def wrap_adapter(model: Any, adapter: PeftAdapter, form: str = "auto") -> list[str]:
    """Freeze a base and give it an adapter, in place: the layers and rows that its file names, and no others.

    Args:
        model: A causal language model without adapters, its linear layers in 4 bits or not.
        adapter: Adapter of any tool, see :func:`read_adapter`.
        form: How products are computed, see :func:`qlora.lora.function.lora_linears`.

    Returns:
        The names of the adapted layers and stacks of experts.

    Raises:
        CheckpointError: The adapter does not fit the base; names all problems.
    """
    check_fits(model, adapter, rows_problems(model, adapter.rows, adapter.tensors))
    wrap_layers(model, {name: _spec(adapter, name, form) for name in adapter.layers})
    for name, layer in lora_layers(model):
        _copy(layer, adapter.layers[name])
    wrap_experts(model, {name: _experts_spec(stored) for name, stored in adapter.experts.items()})
    for name, experts in lora_experts(model):
        copy_experts(experts, adapter.experts[name])
    dtype = _dtype(adapter.tensors[rows.tensor] for rows in adapter.rows.values())
    wrap_stored_rows(model, adapter.rows, adapter.tensors, dtype)
    return [*adapter.layers, *adapter.experts]


def check_fits(model: Any, adapter: PeftAdapter, others: Iterable[str] = ()) -> None:
    """Check that a base has the layers and experts of an adapter, in the same sizes.

    Args:
        model: A causal language model without adapters.
        adapter: Adapter of any tool.
        others: Lines about other parts of the adapter that do not fit.

    Raises:
        CheckpointError: The adapter does not fit the base; names all problems.
    """
    problems = [*_misfits(model, adapter), *others, *experts_problems(model, adapter.experts)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"The adapter {adapter.folder} does not fit {type(model).__name__}:\n{lines}")


def _copy(layer: LoraLinear, stored: StoredAdapter) -> None:
    layer.lora_A.copy_(stored.A)
    layer.lora_B.copy_(stored.B)
    if stored.magnitude is not None:
        layer.first_magnitude.copy_(stored.magnitude)


def _misfits(model: Any, adapter: PeftAdapter) -> list[str]:
    """Return a line for each layer of an adapter that a base can't take."""
    linears, modules = linear_layers(model), dict(model.named_modules())
    problems, absent = [], [name for name in adapter.layers if name not in modules]
    text = text_part(model)
    outside = [name for name in absent if text is not None and text.is_outside(name)]
    if text is not None and outside:
        problems.append(
            f"{len(outside)} of its layers ({', '.join(outside[:3])} …) are not in {text.text_model}, the only part of "
            "this base that is supported"
        )
    elif absent:
        near = difflib.get_close_matches(absent[0], linears, n=1)
        hint = f"; the nearest name is {near[0]}" if near else ""
        more = " …" if len(absent) > 3 else ""
        problems.append(f"the base lacks {len(absent)} of its layers ({', '.join(absent[:3])}{more}){hint}")
    for name, stored in adapter.layers.items():
        if name in absent:
            continue
        layer: Any = linears.get(name)
        if layer is None:
            problems.append(f"{name} is a {type(modules[name]).__name__}; LoRA is only supported on linear layers")
        elif layer is output_head(model):
            problems.append(f"LoRA on the output head {name} is not supported, only rows of it trained in full")
        elif (len(stored.B), stored.A.shape[1]) != (layer.out_features, layer.in_features):
            problems.append(
                f"{name} has factors for a weight of ({len(stored.B)}, {stored.A.shape[1]}), the base's is "
                f"({layer.out_features}, {layer.in_features})"
            )
    return problems


def _spec(adapter: PeftAdapter, name: str, form: str) -> AdapterSpec:
    """Return the spec of a layer by an adapter's config and file."""
    stored, config = adapter.layers[name], adapter.config
    return AdapterSpec(
        rank=len(stored.A),
        alpha=config_alpha(config, name),
        rslora=bool(config.get("use_rslora")),
        dropout=config.get("lora_dropout") or 0.0,
        kind="lora" if stored.magnitude is None else "dora",
        dtype=_dtype([stored.A, stored.B]),
        form=form,
    )


def _experts_spec(stored: StoredExperts) -> AdapterSpec:
    """Return the spec of a stored stack of experts."""
    rank = stored.A.shape[1]
    return AdapterSpec(rank=rank, alpha=stored.scaling * rank, dtype=_dtype([stored.A, stored.B]))


def _dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype that trained parameters are loaded in: bf16 if all are stored in bf16, else fp32."""
    return torch.bfloat16 if {tensor.dtype for tensor in tensors} <= {torch.bfloat16} else torch.float32


def _target_modules(model: nn.Module, adapted: list[str]) -> list[str]:
    """Return the last parts of the adapted names if these select exactly the adapted layers, else full names."""
    parts = sorted({name.rpartition(".")[2] for name in adapted})
    # PEFT compares them with every module: CTRL's linears are named 0 and 2, as its layers are.
    names = {name.removesuffix(".base") for name, _ in model.named_modules()}
    text = text_part(model)
    if text is not None:  # PEFT selects modules of the whole model
        names |= {name for others in text.others.values() for name in others}
    selected = {name for name in names if name.rpartition(".")[2] in parts}
    return parts if selected == set(adapted) else sorted(adapted)
