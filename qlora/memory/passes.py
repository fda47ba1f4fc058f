"""The passes of a micro-batch through a model's layers, and the copies of its head, counted on the meta device."""

import copy
from dataclasses import dataclass

from qlora.lora import output_head
from qlora.lora.host_rows import HostHead, rows_for_host
from qlora.memory.meta_layers import Stack
from qlora.model.loss import Loss
from qlora.model.on_meta import OnMeta, meta_batch

FORWARD, BACKWARD = "F", "B"
# Any number will do; few have few operations.
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Passes:
    """Passes of a micro-batch.

    Attributes:
        order: `F` for each forward pass through the layers, with a gradient or without, and `B` for each backward pass.
        head_copies: Number of times that a head comes to the device, if it is on the host.
    """

    order: str
    head_copies: int


def count_passes(stack: Stack, loss: Loss) -> Passes:
    """Run a micro-batch of a loss on the meta device, and count its passes.

    Layers that are computed again in a backward pass belong to it, because their weights are there.

    Args:
        stack: Reduced layers; the model is left as it was.
        loss: Loss that is minimized.
    """
    model, order = stack.model, [""]

    def begin(*_: object) -> None:
        if order[-1] != BACKWARD:
            order.append(FORWARD)

    head = output_head(model)
    name = next((name for name, layer in rows_for_host(model).items() if layer is head), None)
    counted = None if name is None else HostHead(copy.deepcopy(head))
    handle = stack.layers[0].register_forward_pre_hook(begin)
    try:
        if name is not None:
            model.set_submodule(name, counted)
        with OnMeta():
            for computed in loss.training_passes(model, meta_batch(model, loss, TOKENS, 1)):
                order.append(BACKWARD)
                computed.total.backward()
                order.append("")
    finally:
        handle.remove()
        if name is not None:
            model.set_submodule(name, head)
    return Passes("".join(order), 0 if counted is None else counted.num_copied)
