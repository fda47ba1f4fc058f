"""Shares of a model's linear and expert weights that are in 4 bits; a base with too few of them is refused."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qlora.errors import ModelError
from qlora.layers.experts import check_experts
from qlora.lora import LoraExperts, LoraLinear, embedding_and_head, text_part
from qlora.lora.mixture import expert_stacks
from qlora.model.quantization import quantized_names
from qlora.nf4 import NF4Experts, NF4Linear

LEAST_SHARE = 0.5
# Number of kinds of weights that an error names.
NUM_NAMED = 4


def linear_weights(model: Any) -> Iterator[tuple[str, int, str]]:
    """Yield the weights of linear layers and experts: all of two dimensions or more, without embeddings and head.

    Of a multimodal model, only those of its text part.

    Args:
        model: A model with or without weights and adapters. Its names are those without adapters.

    Yields:
        Name of the module, or of the parameter if it is not called `weight`; number of elements; and what the weight is
        called in messages.
    """
    left_out, text = tuple(f"{name}." for name in embedding_and_head(model)), text_part(model)
    for full_name, module in model.named_modules():
        name = full_name.removesuffix(".base")
        if text is not None and text.is_outside(name):
            continue
        if isinstance(module, nn.Embedding | _ConvNd | LoraLinear | LoraExperts) or f"{name}.".startswith(left_out):
            continue
        if isinstance(module, NF4Linear | NF4Experts):
            yield name, module.numel, name.rpartition(".")[2]
            continue
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and not own_name.endswith("bias"):
                called = name.rpartition(".")[2] if own_name == "weight" else own_name
                called += f" of {parameter.shape[0]} experts" if parameter.dim() == 3 else ""
                yield name if own_name == "weight" else f"{name}.{own_name}", parameter.numel(), called


def check_share(base: str, skeleton: Any, settings: Any) -> None:
    """Check that at least half of a base's linear and expert weights will be in 4 bits.

    Args:
        base: Name of the base.
        skeleton: The model without weights.
        settings: Settings that it is quantized by, see :func:`qlora.model.quantization.settings_of_base`.

    Raises:
        ModelError: Fewer will be, with the names of the largest that stay in 16 bits; or its experts can't be.
    """
    check_experts(skeleton, base)
    total, rest, in_4bit = 0, Counter[str](), {*quantized_names(skeleton, settings), *expert_stacks(skeleton)}
    for name, numel, called in linear_weights(skeleton):
        total += numel
        if name not in in_4bit:
            rest[called] += numel
    share = 1 - rest.total() / total if total else 1.0
    if share >= LEAST_SHARE:
        return
    named = [called for called, _ in rest.most_common(NUM_NAMED)]
    more = f" and {len(rest) - len(named)} more" if len(rest) > len(named) else ""
    gib = 2 * rest.total() / 2**30
    raise ModelError(
        f"{base}: only {share:.0%} of the linear and expert weights would be in 4 bits. In 16 bits: {', '.join(named)}"
        f"{more}, {gib:.2f} GiB. Use another base, or set model.allow_unquantized: true to train with these weights in "
        "16 bits."
    )
