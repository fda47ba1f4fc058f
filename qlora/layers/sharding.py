"""Frozen weights split over processes by torch's `fully_shard`: a layer is whole while it computes or is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.layers.slots import PackedWeight
from qlora.processes import Processes

# What a process does next, as it tells the others.
NOTHING, FORWARD, BACKWARD = 0, 1, 2


class ShardedWeights:
    """The packed weights of a model's layers, of which each process keeps a part.

    `fully_shard` gathers a layer before its forward and backward, and drops it afterwards. All processes have to gather
    the same layers in the same order. Where one has more to do than another, both enter :meth:`together`: a process
    that has nothing left takes part in the gathering of the others.

    Only the codes are split. Their statistics, 3% of the bytes, are on every device, as is what is not in 4 bits.

    Args:
        device: Device that computes.
        processes: Processes that share the weights.

    Attributes:
        kind: Where the weights are kept.
        layer_bytes: Bytes of each layer's packed weights, in the model's order.
        stored_bytes: Bytes that this process keeps: its part of the codes, and all statistics.
    """

    kind = "sharded"

    def __init__(self, device: torch.device, processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.layer_bytes: list[int] = []
        self.stored_bytes = 0
        self._device, self._processes = device, processes
        self._mesh = init_device_mesh(device.type, (processes.world_size,))
        self._indices: set[int] = set()
        self._layers: list[Any] = []
        self._with_gradient: list[Any] = []  # layers that are gathered in a backward pass
        self._calls: list[Any] = []
        self._read: Any = None  # the layer that was gathered to be read outside of a pass
        self._is_uneven = False

    def has(self, index: int) -> bool:
        """Return whether a layer of the model is stored."""
        return index in self._indices

    def store(self, index: int, layer: Any, weights: Sequence[PackedWeight]) -> None:
        """Split the codes of a layer, and have the rest of it on the device.

        Args:
            index: Index of the layer in the model.
            layer: The layer.
            weights: Its packed weights, complete on this process.
        """
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        layer.to(self._device)
        codes = {weight.weight for weight in weights}
        num_bytes = sum(tensor.nbytes for weight in weights for tensor in weight.packed)
        self.layer_bytes.append(num_bytes)
        self.stored_bytes += num_bytes - sum(each.nbytes for each in codes)
        others = {each for each in layer.parameters() if each not in codes}
        # Stated, because a layer without a sharded module around it would otherwise stay whole after its forward.
        fully_shard(layer, mesh=self._mesh, ignored_params=others, reshard_after_forward=True)
        for weight in weights:
            assert isinstance(weight.weight, DTensor)
            self.stored_bytes += weight.weight.to_local().nbytes
            weight.before_read = partial(self._gather, layer, weight)
        self._indices.add(index)
        self._layers.append(layer)

    def finish(self, model: nn.Module) -> None:
        """Have the rest of the model on the device, and watch its passes, in which each layer has to run once."""
        model.to(self._device)
        names = {module: name for name, module in model.named_modules()}
        parent = model.get_submodule(names[self._layers[0]].rpartition(".")[0].rpartition(".")[0])
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end)
        for layer in self._layers:
            layer.register_forward_hook(self._after_layer)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let processes run a different number of passes of the same kind.

        If one fails in between, the others can't know, so it must end; then the launcher ends them too.
        """
        self._is_uneven = True
        try:
            with self._processes.watching_others():
                yield
        except BaseException as error:
            self._processes.leave()
            if isinstance(error, torch.OutOfMemoryError):
                raise ModelError(
                    "Memory ran out. With model.weights: sharded the step can't be retried with less, because the "
                    "other processes wait for this one's part of the weights; lower train.micro_batch_size or "
                    "data.max_seq_len. The same command continues the run from its last save."
                ) from error
            raise
        finally:
            self._is_uneven = False
        while kind := self._announce(NOTHING):
            for layer in [*self._layers, *(reversed(self._with_gradient) if kind == BACKWARD else ())]:
                layer.unshard()
                layer.reshard()

    def _announce(self, kind: int) -> int:
        """Tell the other processes what this one does next; return what those that have something left do."""
        said = self._processes.agree(kind)
        assert len({*said} - {NOTHING}) <= 1, f"processes run different passes: {said}"
        return max(said)

    def _begin(self, *_: Any) -> None:
        self._calls = []
        if self._is_uneven:
            self._announce(BACKWARD if torch.is_grad_enabled() else FORWARD)

    def _after_layer(self, layer: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._calls.append((layer, hidden.requires_grad))

    def _end(self, *_: Any) -> None:
        calls = self._calls
        if [layer for layer, _ in calls] != self._layers:
            raise ModelError(
                "model.weights: sharded is for models that run each layer once, in order, which this one does not; set "
                "it to device or host."
            )
        if torch.is_grad_enabled():
            self._with_gradient = [layer for layer, has_gradient in calls if has_gradient]

    def _gather(self, layer: Any, weight: Any) -> None:
        """Have a layer whole that is read outside of a pass; all processes read the same."""
        from torch.distributed.tensor import DTensor

        if isinstance(weight.weight, DTensor):
            if self._read is not None:
                self._read.reshard()
            layer.unshard()
            self._read = layer
