"""Frozen weights split over processes by torch's `fully_shard`: a layer is whole while it computes or is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qlora.errors import ModelError
from qlora.layers.slots import PackedWeight
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes

# What a process does next, as it tells the others; BACKWARD with the number of layers that get a gradient added.
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
        self._calls: list[Any] = []  # layers of a pass, with whether they get a gradient
        self._in_forward = False
        self._read: Any = None  # the layer that was gathered to be read outside of a pass
        self._is_uneven = False

    def has(self, index: int) -> bool:
        """Return whether a layer of the model is stored."""
        return index in self._indices

    def store(self, index: int, layer: Any, weights: Sequence[PackedWeight]) -> None:
        """Split the codes of a layer over the processes, and move the rest of the layer to the device.

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
        """Move the rest of the model to the device, and watch its passes, in which each layer has to run once.

        Raises:
            ModelError: Its layers are parts of different modules.
        """
        model.to(self._device)
        names = [name for name, module in model.named_modules() if module in self._layers]
        parents = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
        if len(parents) > 1:
            raise ModelError(
                f"model.weights: sharded is for models with one sequence of layers, and this one has {len(parents)}; "
                "set it to device or host."
            )
        parent = model.get_submodule(parents.pop())
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end)
        for layer in self._layers:
            # Before the hook of `fully_shard`, so that the last layer's gradient is announced before it is gathered.
            layer.register_forward_hook(self._after_layer, prepend=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let processes run different numbers of passes.

        If one fails in between, the others can't know, so it must end; then the launcher ends them too.
        """
        self._drop_read()
        self._is_uneven = True
        try:
            with self._processes.watching_others():
                yield
                self._serve()
        except BaseException as error:
            self._processes.leave()
            if is_out_of_memory(error):
                raise ModelError(
                    "Memory ran out. With model.weights: sharded this can't be tried again with less, because the "
                    "other processes wait for this one's part of the weights; set model.recompute: full, or lower "
                    "train.micro_batch_size or data.max_seq_len. A run continues from its last save."
                ) from error
            raise
        finally:
            self._is_uneven = False

    def _serve(self) -> None:
        """Take part in the passes that other processes still run."""
        while kind := self._announce(NOTHING):
            gathered = self._layers if kind == FORWARD else self._layers[::-1][: kind - BACKWARD]
            for layer in gathered:
                layer.unshard()
                layer.reshard()

    def _announce(self, kind: int) -> int:
        """Tell the other processes what this one does next; return what those that have something left do."""
        said = self._processes.agree(kind)
        assert len({*said} - {NOTHING}) <= 1, f"processes run different passes: {said}"
        return max(said)

    def _begin(self, *_: Any) -> None:
        self._drop_read()
        self._calls, self._in_forward = [], True
        if self._is_uneven:
            self._announce(FORWARD)

    def _after_layer(self, layer: Any, _inputs: Any, output: Any) -> None:
        if not self._in_forward:  # it is computed again
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self._calls.append((layer, hidden.requires_grad))
        num_layers = sum(has_gradient for _, has_gradient in self._calls)
        if self._is_uneven and layer is self._layers[-1] and hidden.requires_grad:
            hidden.register_hook(lambda _grad: self._announce_backward(num_layers))

    def _announce_backward(self, num_layers: int) -> None:
        self._announce(BACKWARD + num_layers)

    def _end(self, *_: Any) -> None:
        self._in_forward = False
        if [layer for layer, _ in self._calls] != self._layers:
            raise ModelError(
                "model.weights: sharded is for models that run each layer once, in order, which this one does not; set "
                "it to device or host."
            )

    def _drop_read(self) -> None:
        """Drop the parts of other processes that were gathered to be read."""
        if self._read is not None:
            self._read.reshard()
            self._read = None

    def _gather(self, layer: Any, weight: Any) -> None:
        """Gather a layer to read it outside of a pass; all processes read the same."""
        from torch.distributed.tensor import DTensor

        if isinstance(weight.weight, DTensor):
            self._drop_read()
            layer.unshard()
            self._read = layer
