"""Adapters that the loss does not depend on, found without weights before a base is loaded."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from qlora.config import LoraSection
from qlora.errors import ModelError
from qlora.lora import reads_images, text_model
from qlora.lora.mixture import expert_stacks
from qlora.model.from_config import adapter_specs, expert_specs
from qlora.model.loss import Loss, model_inputs
from qlora.model.on_meta import OnMeta, meta_batch

# Most layers are reached by any document, and a short one has fewer operations.
SHORT = 32
MOST_NAMED = 4


def check_reached(skeleton: Any, section: LoraSection, loss: Loss, num_tokens: int) -> None:
    """Check that the loss depends on every layer that gets an adapter, by running the model on the meta device.

    Some layers compute nothing that is learned from: indexers that only choose tokens, attention to an encoder that is
    not there. An adapter whose gradient is zero by its values passes, and so do all adapters of a model that can't be
    run without values, and those of a layer that reads values, such as a mixture that skips experts without tokens;
    :func:`refuse_unreached` has them refused in the first step.

    Args:
        skeleton: The base without weights and adapters; it is left as it was.
        section: Which layers get an adapter.
        loss: Loss that is minimized.
        num_tokens: Number of tokens of the longest document.

    Raises:
        ModelError: There are layers that it does not depend on.
    """
    names = [*adapter_specs(skeleton, section), *expert_specs(skeleton, section)]
    stacks = expert_stacks(skeleton)
    modules = {name: stacks[name].layer if name in stacks else name for name in names}
    dead, undecided = {*modules.values()}, set[str]()
    was_training = skeleton.training
    # What is not reached is run again as in a step: some layers have code for training, or skip short documents.
    for tokens, is_training in ((min(SHORT, num_tokens), False), (num_tokens, True)):
        try:
            dead, undecided = _unreached(skeleton.train(is_training), dead, loss, tokens)
        except Exception:  # an architecture can raise anything where it needs values
            return
        finally:
            skeleton.train(was_training)
        if not dead:
            return
    refuse_unreached([name for name in names if modules[name] in dead - undecided], names)


def refuse_unreached(unreached: Sequence[str], adapted: Sequence[str]) -> None:
    """Refuse a model with adapters that no gradient reaches.

    Args:
        unreached: Names of their layers.
        adapted: Names of all adapted layers.

    Raises:
        ModelError: There are such adapters.
    """
    if not unreached:
        return
    more = f" and {len(unreached) - MOST_NAMED} more" if len(unreached) > MOST_NAMED else ""
    others = {*adapted} - {*unreached}
    ends = list(dict.fromkeys(_end_of(name, others) for name in unreached))
    remedy = f"Leave them out with lora.exclude: [{', '.join(ends)}]" if others else "Choose other lora.targets"
    raise ModelError(
        f"No gradient of the loss reaches {len(unreached)} of {len(adapted)} adapters, so they would not be trained: "
        f"{', '.join(unreached[:MOST_NAMED])}{more}. {remedy}."
    )


def _end_of(name: str, others: Collection[str]) -> str:
    """Return the fewest last parts of a layer's name that no other name ends with."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(f".{other}".endswith(f".{end}") for other in others):
            return end
    return name


def _unreached(model: Any, modules: Collection[str], loss: Loss, tokens: int) -> tuple[set[str], set[str]]:
    """Return the names of the modules whose output what the loss is computed from does not depend on.

    Returns:
        Their names, and the names of those among them that are part of a layer that read a value.
    """
    mode = OnMeta()
    probes = {name: torch.empty((), device="meta", requires_grad=True) for name in modules}
    handles = [model.get_submodule(name).register_forward_hook(_adding(probe)) for name, probe in probes.items()]
    layers = {name: _layer_of(name) for name in modules}
    readers: set[str] = set()
    for name in {layer for layer in layers.values() if layer is not None}:
        handles += _watch_reads(model.get_submodule(name), name, mode, readers)
    try:
        with mode:
            inputs = model_inputs(model, meta_batch(model, loss, tokens, 1))
            outputs = model(**inputs).logits if reads_images(model) else text_model(model)(**inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    # A walk through the graph needs no backward, which more operations can't be run in without values.
    seen: set[Any] = set()
    reached: set[Any] = set()
    pending = [outputs.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(getattr(node, "variable", None))
        pending += [following for following, _ in node.next_functions]
    unreached = {name for name, probe in probes.items() if probe not in reached}
    return unreached, {name for name in unreached if layers[name] in readers}


def _layer_of(name: str) -> str | None:
    """Return the name of the outermost element of a list that contains a module; None if there is none.

    What a model reads outside its layers, to make masks, does not choose between parts of a layer.
    """
    parts = name.split(".")
    return next((".".join(parts[: end + 1]) for end, part in enumerate(parts) if part.isdigit()), None)


def _watch_reads(layer: nn.Module, name: str, mode: OnMeta, readers: set[str]) -> list[Any]:
    """Add a layer's name to `readers` when its forward reads a value; return the handles of the hooks that do so."""
    before: list[int] = []

    def end(*_: Any) -> None:
        if mode.num_reads > before.pop():
            readers.add(name)

    begin = layer.register_forward_pre_hook(lambda *_: before.append(mode.num_reads))
    return [begin, layer.register_forward_hook(end)]


def _adding(probe: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    """Return a hook that adds a probe to a module's output."""
    return lambda _module, _inputs, output: output + probe
