"""Parameters of a model by the names that its checkpoint has for them, and which way they lie there."""

from collections.abc import Iterable
from typing import Any


def names_in_files(skeleton: Any, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Finds each parameter's tensor as transformers would while loading, by its own tables.

    transformers renames some checkpoints' tensors (a prefix more or less, a module that was called otherwise) and
    makes some parameters out of several tensors, or several out of one.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.

    Returns:
        The tensor of each parameter that is one tensor as it is, and the tensors that each other one is made of.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    parameters = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    single: dict[str, str] = {}
    made: dict[str, list[str]] = {}
    for name in stored:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, pattern = name, None  # a table may match what has its final name already
        if pattern is None:
            single[parameter] = name
            continue
        converter = next(converter for converter in converters if pattern in converter.source_patterns)
        for target in converter.target_patterns:
            made.setdefault(parameter.replace(converter.target_patterns[0], target), []).append(name)
    return single, made


def transposed_modules(skeleton: Any) -> set[str]:
    """Layers of GPT-2's kind, whose weights are stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}


def ends_in_files(skeleton: Any, stored: Iterable[str]) -> tuple[str | None, str | None]:
    """The tensors of a model's embedding and output head; None for one that has none of its own there.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.
    """
    single, _ = names_in_files(skeleton, stored)
    modules = {module: name for name, module in skeleton.named_modules()}
    embedding, head = (
        single.get(f"{modules.get(layer)}.weight")
        for layer in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    )
    return embedding, head
