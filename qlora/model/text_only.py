"""Multimodal classes of transformers without the parts that text does not pass: vision, audio and their projectors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.lora import TextPart, output_head, text_part
from qlora.model.names import names_in_files

# Shape of a mask that transformers passes on to the text model as it is.
ANY_MASK = (1, 1, 1, 1)


def text_only(whole: Any) -> Any:
    """Return a multimodal class that builds the modules that text passes, and no others.

    Its modules have the names that they have in the whole class, so that files, adapters and other tools agree on them,
    and its methods are those of the whole class. Each instance has a :class:`TextPart`.

    Args:
        whole: A class of transformers, such as `LlavaForConditionalGeneration`.
    """

    def build(self: Any, config: Any) -> None:
        whole.__init__(self, config)
        _leave_out_other_parts(self)

    return type(whole.__name__, (whole,), {"__module__": whole.__module__, "__init__": build})


def tensors_of_text(skeleton: Any, stored: Iterable[str]) -> set[str]:
    """Return the names of the stored tensors that parameters of a model are made of.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.
    """
    one_to_one, converted = names_in_files(skeleton, stored)
    parameters = skeleton.state_dict()
    names = {tensor for parameter, tensor in one_to_one.items() if parameter in parameters}
    return names.union(*(tensors for parameter, tensors in converted.items() if parameter in parameters))


def names_as_text(skeleton: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return the names that stored tensors have in a model of text alone; of a multimodal model, only those of text.

    Args:
        skeleton: The model without weights.
        stored: Names of the tensors in the files.
    """
    text = text_part(skeleton)
    if text is None:
        return {name: name for name in stored}
    one_to_one, _ = names_in_files(skeleton, stored)
    parameters, prefix = skeleton.state_dict(), f"{text.text_model}."
    return {
        name: f"model.{parameter.removeprefix(prefix)}" if parameter.startswith(prefix) else parameter
        for parameter, name in one_to_one.items()
        if parameter in parameters
    }


def _leave_out_other_parts(model: Any) -> None:
    """Remove the modules that text does not pass, in place.

    Raises:
        ModelError: Text does not get to the text model without them.
    """
    name, text = find_text_model(model)
    parts = _other_parts(model, name)
    passed = _passed_parts(model, text, parts)
    names = {
        part: [f"{part}.{own}".removesuffix(".") for own, _ in module.named_modules()] for part, module in parts.items()
    }
    for part in parts.keys() - passed:
        parent, _, attribute = part.rpartition(".")
        setattr(model.get_submodule(parent), attribute, None)
    _passed_parts(model, text, {})  # again, since some classes read attributes of modules that they do not call
    _check_outputs(model, text)
    model.text_part = TextPart(name, names)


def find_text_model(model: Any) -> tuple[str, Any]:
    """Return the innermost model of transformers around the input embeddings, with its name."""
    from transformers import PreTrainedModel

    embeddings = model.get_input_embeddings()
    around = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(each is embeddings for each in module.modules())
    ]
    return around[-1]


def _other_parts(model: Any, text_model: str) -> dict[str, nn.Module]:
    """Return the modules beside the text model and the output head, and beside the modules that these are in."""
    head = output_head(model)
    names = [text_model, *(name for name, module in model.named_modules() if module is head)]
    parents = {"", *(name[:end] for name in names for end, letter in enumerate(name) if letter == ".")}
    return {
        name: module
        for name, module in model.named_modules()
        if name and name.rpartition(".")[0] in parents and name not in parents and name not in names
    }


class _Arrived(Exception):  # noqa: N818 (a signal, no error)
    """Text has arrived at the text model."""


@torch.no_grad()
def _passed_parts(model: Any, text: nn.Module, parts: dict[str, nn.Module]) -> set[str]:
    """Return the parts that are called on a token's way to the text model, which is not run.

    Args:
        model: A multimodal model, on the meta device or any other.
        text: Its text model.
        parts: Modules by name.

    Raises:
        ModelError: The token does not arrive there.
    """
    passed: set[str] = set()

    def arrive(*_: Any) -> None:
        raise _Arrived

    handles = [text.register_forward_pre_hook(arrive)]
    for name, module in parts.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: passed.add(name)))
    try:
        _run_on_a_token(model)
        reason = "the text model is not called"
    except _Arrived:
        return passed
    except Exception as error:  # an architecture can raise anything where it needs other inputs
        reason = str(error) or type(error).__name__
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(
        f"{type(model).__name__} takes no text without its other parts ({reason}), so it can't be trained."
    )


@torch.no_grad()
def _check_outputs(model: Any, text: nn.Module) -> None:
    """Check that a class finds what it reads of its text model's outputs, by a token that passes no layers.

    What fails otherwise, because of the layers that are left out, is no sign of anything.

    Raises:
        ModelError: It reads an output that there is not.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.utils import ModelOutput

    layers = [module for module in text.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        _run_on_a_token(model)
    except AttributeError as error:
        if isinstance(error.obj, ModelOutput):
            raise ModelError(
                f"{type(model).__name__} reads {error.name} of its text model's outputs, which have no such value, so "
                "this version of transformers can't run it; install another version."
            ) from error
    except Exception:  # an architecture can raise anything without its layers
        return
    finally:
        for layer in layers:
            del layer.forward


def _run_on_a_token(model: Any) -> None:
    device = model.get_input_embeddings().weight.device
    ids, mask = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(ANY_MASK, device=device)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
