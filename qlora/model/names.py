"""Names of a model's parameters in its checkpoint files, and the orientation they are stored in."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
