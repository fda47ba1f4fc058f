"""Names of a model's parameters in its checkpoint files, and the orientation they are stored in."""

import difflib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora.errors import ModelError
from qlora.lora import input_embedding, output_head


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A stored tensor, with the parameter that it is loaded into.

    Attributes:
        name: Name of the tensor.
        parameter: Name of the parameter; of the first one if it is split into several.
        converter: transformers' converter that builds the parameter from several tensors, or splits the tensor; None
            if the parameter is the tensor as it is stored.
        pattern: The converter's pattern for tensors of this kind; None without a converter.
    """

    name: str
    parameter: str
    converter: Any = None
    pattern: str | None = None


def names_in_files(skeleton: Any, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Find the stored tensors of each parameter, by the tables that transformers loads with.

    While loading, transformers renames tensors of some checkpoints (another prefix, another module name), builds
    some parameters from several tensors, and splits some tensors into several parameters.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.

    Returns:
        The tensor of each parameter that is one tensor as stored, and the tensors that each converted one is
        built from.
    """
    one_to_one: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    for tensor in named_tensors(skeleton, stored):
        if tensor.converter is None:
            one_to_one[tensor.parameter] = tensor.name
            continue
        first, *_ = targets = tensor.converter.target_patterns
        for target in targets:
            converted.setdefault(tensor.parameter.replace(first, target), []).append(tensor.name)
    return one_to_one, converted


def tensors_of_layers(
    skeleton: Any, stored: Collection[str], layers: Iterable[str], base: str, remedy: str
) -> dict[str, str]:
    """Return the stored tensor of each layer's weight, by the layer's name.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.
        layers: Names of layers whose weights are read, or written, one at a time.
        base: Name of the base, for messages.
        remedy: End of the sentence about layers that are parts of other tensors: what that prevents, and what to do.

    Raises:
        ModelError: A layer's weight is missing, or part of another tensor.
    """
    one_to_one, converted = names_in_files(skeleton, stored)
    layers = list(layers)
    if fused := [layer for layer in layers if f"{layer}.weight" in converted]:
        raise ModelError(
            f"{len(fused)} layers are not tensors of their own in the files of {base} ({', '.join(fused[:3])} …; the "
            f"first is made of {', '.join(converted[f'{fused[0]}.weight'][:3])}), {remedy}"
        )
    if missing := [layer for layer in layers if f"{layer}.weight" not in one_to_one]:
        near = difflib.get_close_matches(f"{missing[0]}.weight", stored, n=1)
        hint = f"; the nearest name there is {near[0]}" if near else ""
        raise ModelError(
            f"The files of {base} lack the weights of {len(missing)} layers under their names "
            f"({', '.join(f'{layer}.weight' for layer in missing[:3])} …{hint}); download the base again, or load it "
            "with transformers, save it, and use the saved copy."
        )
    return {layer: one_to_one[f"{layer}.weight"] for layer in layers}


def named_tensors(skeleton: Any, stored: Iterable[str]) -> Iterator[NamedTensor]:
    """Yield each stored tensor with its parameter; see :func:`names_in_files`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    parameters = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    for name in stored:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, pattern = name, None  # a table may match a tensor that has its final name already
        converter = None
        if pattern is not None:
            converter = next(converter for converter in converters if pattern in converter.source_patterns)
        yield NamedTensor(name, parameter, converter, pattern)


def transposed_modules(skeleton: Any) -> set[str]:
    """Return the names of GPT-2's `Conv1D` layers, whose weights are stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}


def embedding_and_head_tensors(skeleton: Any, stored: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the stored embedding and output head; None for one that the files do not hold.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.
    """
    one_to_one, _ = names_in_files(skeleton, stored)
    modules = {module: name for name, module in skeleton.named_modules()}
    embedding, head = (
        one_to_one.get(f"{modules.get(layer)}.weight") for layer in (input_embedding(skeleton), output_head(skeleton))
    )
    return embedding, head
