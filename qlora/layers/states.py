"""Layers that carry a state from token to token, such as Gated DeltaNet, Mamba and short convolutions.

In a packed sequence the state must not cross from one document to the next. Each such layer gets the documents' borders
where transformers' kernels take them; otherwise it runs on one document at a time, which is exact on any device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from qlora.layers.trial import is_close
from qlora.lora import text_model

ARGUMENT = "state_lengths"
# Arguments about documents that are meant for attention; plain versions of state layers refuse some of them.
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "document_lengths", "seq_idx")
# Parameter of a state space's decay, by the name that every architecture has from the code of the Mamba paper.
DECAY = "A_log"
# Number of tokens that kernels compute at a time where the layer has no `chunk_size`, as those of gated delta rules.
CHUNK = 64
# Largest difference between a kernel's results and those of separate documents, as a share of a row's size, in units
# of the dtype's precision; a state that crosses a border differs by hundreds of times as much.
TOLERANCE = 16

Forward = Callable[..., Any]
# Lengths of the documents of the packed sequence that is being computed; None if each document has its own row.
_lengths: ContextVar[tuple[int, ...] | None] = ContextVar(ARGUMENT, default=None)


def state_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that carry a state from token to token, by name.

    They are the modules that hold a depthwise convolution over the tokens or the decay of a state space; of nested
    modules, the outermost.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = name.startswith(tuple(f"{outer}." for outer in found))
        if not is_inside and (hasattr(module, DECAY) or any(map(_is_depthwise, module.children()))):
            found[name] = module
    return found


@dataclass(frozen=True, slots=True)
class DocumentStates:
    """How the layers of a model begin again with every document.

    Attributes:
        ways: How each class of layers computes: `borders` or `documents` (one at a time).
        why: Reasons of those that compute one document at a time; None if there are none.
    """

    ways: dict[str, str]
    why: str | None
    _forwards: dict[nn.Module, Forward | None] = field(repr=False)
    _hooks: tuple[Any, ...] = field(repr=False)

    def remove(self) -> None:
        """Undo :func:`use_document_states`, whose changes must be the last ones of these layers' forward."""
        for layer, forward in self._forwards.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
        for hook in self._hooks:
            hook.remove()


def use_document_states(model: Any) -> DocumentStates | None:
    """Have the state of a model's layers begin again with every document of a packed sequence.

    A layer gets the documents' borders if it computes the same with them as on separate documents, which is tried on
    random values. Otherwise it runs on one document at a time. The base model then takes the documents' lengths as the
    argument `state_lengths`.

    Args:
        model: A model of transformers, on its device, with adapters if it gets any.

    Returns:
        How the layers compute now; None if there are none.
    """
    reasons: dict[type, str | None] = {}
    forwards: dict[nn.Module, Forward | None] = {}
    for layer in state_layers(model).values():
        kind = type(layer)
        if kind not in reasons:
            reasons[kind] = _unusable_reason(layer, model)
        forwards[layer] = vars(layer).get("forward")
        # Set on the instance: a module around it would change the names of its parameters.
        layer.forward = partial(_with_borders if reasons[kind] is None else _by_documents, layer.forward)
    if not reasons:
        return None
    hooks = (
        text_model(model).register_forward_pre_hook(_begin, with_kwargs=True),
        text_model(model).register_forward_hook(_end, always_call=True),
    )
    ways = {kind.__name__: "borders" if reason is None else "documents" for kind, reason in reasons.items()}
    why = "; ".join(f"{kind.__name__}: {reason}" for kind, reason in reasons.items() if reason is not None)
    return DocumentStates(ways, why or None, forwards, hooks)


def longest_chunk(model: nn.Module) -> int:
    """Return the largest number of tokens that a layer with a state computes at a time; 0 if there is no such layer."""
    return max(map(_chunk, state_layers(model).values()), default=0)


def takes_lengths(model: Any) -> bool:
    """Return whether a model's base takes the documents' lengths for its state layers."""
    return _begin in text_model(model)._forward_pre_hooks.values()


class SameDocuments(AbstractContextManager[None]):
    """Context that computes with the documents of the moment that it is made in, as a recomputation must.

    It can be entered more than once, in any thread.
    """

    def __init__(self) -> None:
        self._lengths = _lengths.get()
        self._tokens: list[Token[tuple[int, ...] | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_lengths.set(self._lengths))

    def __exit__(self, *error: Any) -> None:
        _lengths.reset(self._tokens.pop())


def _begin(_module: Any, inputs: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    lengths = arguments.pop(ARGUMENT, None)
    _lengths.set(None if lengths is None else tuple(lengths))
    return inputs, arguments


def _end(*_: Any) -> None:
    _lengths.set(None)


def _chunk(layer: nn.Module) -> int:
    size = getattr(layer, "chunk_size", None)
    return size if isinstance(size, int) else CHUNK


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels and module.kernel_size[0] > 1


def _by_documents(forward: Forward, *inputs: Any, **arguments: Any) -> Any:
    """Call a layer's forward once per document, with the document's part of every tensor of (1, seq, …)."""
    arguments = {name: value for name, value in arguments.items() if name not in BORDERS}
    lengths = _lengths.get()
    if lengths is None:
        return forward(*inputs, **arguments)
    borders = [0, *accumulate(lengths)]

    def part(begin: int, end: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, begin:end] if tensor.shape[:2] == (1, borders[-1]) else tensor

    outputs = []
    for begin, end in pairwise(borders):
        own_inputs, own = tree_map_only(torch.Tensor, partial(part, begin, end), (inputs, arguments))
        outputs.append(forward(*own_inputs, **own))
    if isinstance(outputs[0], tuple):  # with weights or a cache, which training has none of
        return torch.cat([output for output, *_ in outputs], dim=1), *outputs[-1][1:]
    return torch.cat(outputs, dim=1)


def _with_borders(forward: Forward, *inputs: Any, **arguments: Any) -> Any:
    """Call a layer's forward once, with the borders for its kernels: `seq_idx` and `cu_seq_lens_q`."""
    arguments = {name: value for name, value in arguments.items() if name not in BORDERS}
    lengths = _lengths.get()
    if lengths is None:
        return forward(*inputs, **arguments)
    device = next(each for each in (*inputs, *arguments.values()) if isinstance(each, torch.Tensor)).device
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return forward(*inputs, **arguments, seq_idx=numbers[None].to(device), cu_seq_lens_q=starts.to(device))


def _unusable_reason(layer: Any, model: Any) -> str | None:
    """Return why a layer can't be given the borders; None if outputs and gradients are those of separate documents."""
    if model.device.type == "meta":
        return "nothing is computed"
    generator = torch.Generator().manual_seed(0)
    # Shorter than a convolution, across the borders of chunks, and within one.
    lengths = (5, _chunk(layer) * 5 // 4 + 1, 3)
    size = (1, sum(lengths), model.config.get_text_config().hidden_size)
    x, grad_output = (torch.randn(size, generator=generator).to(model.device, model.dtype) for _ in range(2))
    was_training, layer.training = layer.training, True  # of the layer alone: some call other kernels in training
    token = _lengths.set(lengths)
    try:
        found, expected = (
            _with_gradient(partial(way, layer.forward), x, grad_output) for way in (_with_borders, _by_documents)
        )
    except Exception as error:  # kernels and their replacements raise anything
        return str(error).partition(". ")[0] or type(error).__name__
    finally:
        _lengths.reset(token)
        layer.training = was_training
    tolerance = TOLERANCE * torch.finfo(model.dtype).eps
    if all(is_close(one, other, tolerance) for one, other in zip(found, expected, strict=True)):
        return None
    return "its results with borders differ from those of separate documents"


def _with_gradient(function: Forward, x: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = function(x)
    (gradient,) = torch.autograd.grad(output, x, grad_output.to(output.dtype))
    return output.detach(), gradient
