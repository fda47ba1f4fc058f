"""Experts' weights in a base's files: read one expert at a time as the model has them, and written back the same way.

transformers' converters build a fused parameter, (experts, rows, columns), from the files' tensors: one for each expert
and projection, or one for all experts. Given the tensors of a single expert, a converter builds that expert alone, and
run backwards it gives that expert's tensors.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora.errors import ModelError
from qlora.lora.mixture import ExpertStack, expert_stacks
from qlora.model.names import named_tensors


class Reader(Protocol):
    """What tensors of the files are read from, such as :class:`qlora.model.BaseWeights`."""

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Return a tensor, or some of its rows."""


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The tensors of a base's files that a fused parameter is built from.

    Attributes:
        stack: The parameter.
        sources: Names of the tensors by the converter's pattern: one for each expert, in order, or one for all.
        converter: transformers' converter; None if the parameter is one tensor as it is stored.
        skeleton: The model without weights, which converters ask for its config.
    """

    stack: ExpertStack
    sources: dict[str, list[str]]
    converter: Any
    skeleton: Any

    @property
    def names(self) -> list[str]:
        """Names of all its tensors."""
        return [name for names in self.sources.values() for name in names]

    def expert_of(self, name: str) -> int | None:
        """Return the expert that a tensor belongs to; None if it holds all of them."""
        names = next(names for names in self.sources.values() if name in names)
        return names.index(name) if len(names) > 1 else None

    def read(self, base: Reader, expert: int) -> torch.Tensor:
        """Return the weight of an expert as the model has it, (rows, columns), in the stored dtype."""
        tensors = {pattern: self._read(base, names, expert) for pattern, names in self.sources.items()}
        if self.converter is None:
            return next(iter(tensors.values()))[0]
        converter = deepcopy(self.converter)
        for pattern, tensor in tensors.items():
            converter.add_tensor(self.stack.name, self.sources[pattern][0], pattern, tensor)
        (found,) = converter.convert(self.stack.name, model=self.skeleton, config=self.skeleton.config).values()
        whole: torch.Tensor = found[0] if isinstance(found, list) else found
        return whole[0]

    def split(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of an expert's weight in the files' layout, by pattern.

        Args:
            weight: (rows, columns), as the model has it.
        """
        if self.converter is None:
            return dict.fromkeys(self.sources, weight)
        backwards = deepcopy(self.converter).reverse_transform()
        name, pattern = backwards.rename_source_key(self.stack.name)
        backwards.add_tensor(name, self.stack.name, pattern, weight[None])
        found = backwards.convert(name, model=self.skeleton, config=self.skeleton.config).values()
        parts = (part[0] if isinstance(part, list) else part for part in found)
        split = dict(zip(self.converter.source_patterns, parts, strict=True))
        # A tensor that holds all experts is (1, …) here.
        return {key: part if len(self.sources[key]) > 1 else part[0] for key, part in split.items()}

    @staticmethod
    def _read(base: Reader, names: list[str], expert: int) -> torch.Tensor:
        return base.read(names[expert]) if len(names) > 1 else base.read(names[0], slice(expert, expert + 1))


def expert_tensors(skeleton: Any, stored: Iterable[str], base: str) -> dict[str, ExpertTensors]:
    """Find the stored tensors of each stack of experts.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.
        base: Name of the base, for messages.

    Returns:
        The tensors by the name of the parameter.

    Raises:
        ModelError: Experts are stored in a way that can't be read one at a time.
    """
    from transformers.core_model_loading import dot_natural_key

    stacks = expert_stacks(skeleton)
    if not stacks:
        return {}
    sources: dict[str, dict[str, list[str]]] = {name: {} for name in stacks}
    converters: dict[str, Any] = {}
    for tensor in sorted(named_tensors(skeleton, stored), key=lambda tensor: dot_natural_key(tensor.name)):
        if tensor.parameter in stacks:
            sources[tensor.parameter].setdefault(tensor.pattern or tensor.name, []).append(tensor.name)
            converters[tensor.parameter] = tensor.converter
    return {name: _checked(stacks[name], own, converters.get(name), skeleton, base) for name, own in sources.items()}


def _checked(
    stack: ExpertStack, sources: Mapping[str, list[str]], converter: Any, skeleton: Any, base: str
) -> ExpertTensors:
    counts = {len(names) for names in sources.values()}
    patterns = [] if converter is None else converter.source_patterns
    is_whole = len(counts) == 1 and counts <= {1, stack.shape[0]} and (converter is None or {*patterns} == {*sources})
    if not is_whole or (converter is not None and len(converter.target_patterns) != 1):
        raise ModelError(
            f"{base}: the {stack.shape[0]} experts of {stack.name} are not stored as one tensor for each or one for "
            "all, so they can't be merged; use another base."
        )
    ordered = {pattern: sources[pattern] for pattern in patterns} if patterns else dict(sources)
    return ExpertTensors(stack, ordered, converter, skeleton)
