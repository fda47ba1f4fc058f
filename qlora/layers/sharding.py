"""Frozen weights split over processes by torch's `fully_shard`: a layer is whole while it computes or is read."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qlora.errors import ModelError
from qlora.layers.slots import PackedLayer, PackedWeight
from qlora.lora import RecomputedWeights
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes, all_gather

# What a process is doing, and the message by which it announces its next pass. In a message, the number of layers that
# get a gradient is added to BACKWARD.
NOTHING, FORWARD, BACKWARD = 0, 1, 2
NO_MEMORY = (
    "Memory ran out. With model.weights: sharded the step can't be tried again with less, because {}; set "
    "model.recompute: full, or lower train.micro_batch_size or data.max_seq_len. A run continues from its last save."
)
TOO_LITTLE = "too little is left for the layers that the other processes wait for"
OLD_TORCH = "going on after an aborted pass needs torch 2.13, and this is torch {}"


class ShardedWeights:
    """The packed weights of a model's layers, of which each process keeps a part.

    `fully_shard` gathers a layer before its forward and backward, and drops it afterwards; the layer that follows is
    gathered while it computes. All processes have to gather the same layers in the same order. Where one runs more
    passes than another, both enter :meth:`together`: a process that is done gathers layers with the others until they
    are done too.

    Codes and statistics of a layer are one parameter of bytes, which is split; the weights are views of it while it is
    gathered, because torch gathers it to the same storage each time. What is not in 4 bits is on every device.

    Args:
        device: Device that computes.
        processes: Processes that share the weights.

    Attributes:
        kind: Where the weights are kept.
        stored_bytes: Bytes that this process keeps.
    """

    kind = "sharded"

    def __init__(self, device: torch.device, processes: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.stored_bytes = 0
        self._device, self._processes = device, processes
        self._mesh = init_device_mesh(device.type, (processes.world_size,))
        self._stored: dict[int, tuple[Any, int]] = {}  # layers and their bytes
        self._layers: list[Any] = []
        self._root: Any = None
        self._calls: list[Any] = []  # layers of a pass, with whether they get a gradient
        self._doing = NOTHING
        self._read: Any = None  # the layer that was gathered to be read outside of a pass
        self._is_uneven = False
        self._pass: Sequence[Any] = []  # layers that all processes gather in the pass that they agreed on last
        self._gathers = _CountedGathers()

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's packed weights, in the model's order."""
        return [num_bytes for _, (_, num_bytes) in sorted(self._stored.items())]

    def has(self, index: int) -> bool:
        """Return whether a layer of the model is stored."""
        return index in self._stored

    def store(self, index: int, layer: Any, weights: Sequence[PackedWeight]) -> None:
        """Split the packed weights of a layer over the processes, and move the rest of the layer to the device.

        Args:
            index: Index of the layer in the model.
            layer: The layer.
            weights: Its packed weights, complete on this process.
        """
        from torch.distributed.fsdp import fully_shard

        layer.to(self._device)
        packed, others = PackedLayer(weights), {*layer.parameters()}
        layer.packed_weights = SplitBytes(packed.take(self._device))
        fully_shard(layer, mesh=self._mesh, ignored_params=others)
        layer.set_custom_all_gather(self._gathers)
        packed.fetch_by(partial(self._gather, layer, packed))
        self.stored_bytes += layer.packed_weights.content.to_local().nbytes
        self._stored[index] = layer, packed.num_bytes

    def finish(self, model: nn.Module) -> None:
        """Move the rest of the model to the device, and watch its passes, in which each layer has to run once.

        Raises:
            ModelError: Its layers are parts of different modules.
        """
        from torch.distributed.fsdp import fully_shard

        model.to(self._device)
        self._layers = [layer for _, (layer, _) in sorted(self._stored.items())]
        names = [name for name, module in model.named_modules() if module in self._layers]
        parents = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
        if len(parents) > 1:
            raise ModelError(
                f"model.weights: sharded is for models with one sequence of layers, and this one has {len(parents)}; "
                "set it to device or host."
            )
        self._root = model.get_submodule(parents.pop())
        # The root splits nothing itself, but torch gathers layers ahead only on streams that they share through a root.
        fully_shard(self._root, mesh=self._mesh, ignored_params=set(self._root.parameters()))
        for layer, following in pairwise(self._layers):
            layer.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([layer])
        # The first layer names itself, which has no effect. With no layer named, torch would follow an earlier pass.
        self._layers[0].set_modules_to_backward_prefetch(self._layers[:1])
        self._root.register_forward_pre_hook(self._begin)
        self._root.register_forward_hook(self._end)
        for layer in self._layers:
            # Before the hook of `fully_shard`, so that the last layer's gradient is announced before it is gathered.
            layer.register_forward_hook(self._after_layer, prepend=True)

    @contextmanager
    def together(self, is_retried: bool = False) -> Iterator[None]:
        """Let processes run different numbers of passes.

        A process that fails leaves, and the others stop with an error at the next layer that they gather.

        Args:
            is_retried: Whether all processes retry together if memory runs out on some. One that runs out then gathers
                layers with the others until they are done, and raises its error; otherwise it leaves at once.

        Raises:
            torch.OutOfMemoryError: Memory ran out on this process. If `is_retried`, all are at the end of the context.
            ModelError: Memory ran out, and the process can't take part any more; or another process has ended.
        """
        self._drop_read()
        self._is_uneven, self._pass, lack = True, [], None
        try:
            with self._processes.watching_others():
                try:
                    yield
                except Exception as error:
                    # After an error of NCCL itself, it can't be used any more.
                    if not (is_retried and is_out_of_memory(error)) or isinstance(error, dist.DistError):
                        raise
                    lack = error
                    self._abort_pass(error)
                self._serve()
        except BaseException as error:
            self._processes.leave()
            if is_retried and is_out_of_memory(error):
                raise ModelError(NO_MEMORY.format(TOO_LITTLE)) from error
            raise
        finally:
            self._is_uneven = False
        if lack is not None:
            raise lack

    def _abort_pass(self, error: Exception) -> None:
        """Free the tensors of the pass in which memory ran out, and take part in the rest of it."""
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass
        RecomputedWeights.clear()  # the rest of its backward would have taken them
        if hasattr(self._root, "reset_iter_state"):
            self._root.reset_iter_state()
        elif self._doing != NOTHING:
            raise ModelError(NO_MEMORY.format(OLD_TORCH.format(torch.__version__)))
        self._doing = NOTHING
        self._take_part()

    def _serve(self) -> None:
        """Take part in the passes that other processes still run."""
        self._drop_read()  # a layer that is still there would not be gathered again, and the others would wait for it
        while self._agree(NOTHING):
            self._take_part()

    def _take_part(self) -> None:
        """Take part in gathering the layers of a pass that this process has not gathered yet."""
        for layer in self._pass[self._gathers.num_issued :]:
            layer.unshard()
            layer.reshard()

    def _agree(self, kind: int) -> int:
        """Tell the other processes what this one does next; return what those that have something left do."""
        said = self._processes.agree(kind)
        assert len({*said} - {NOTHING}) <= 1, f"processes run different passes: {said}"
        kind, self._gathers.num_issued = max(said), 0
        if kind < BACKWARD:
            self._pass = self._layers if kind == FORWARD else []
        else:  # the last layer that gets a gradient has the one before it gathered ahead
            self._pass = self._layers[::-1][: kind - BACKWARD + 1]
        return kind

    def _begin(self, *_: Any) -> None:
        self._drop_read()
        self._calls, self._doing = [], FORWARD
        if self._is_uneven:
            self._agree(FORWARD)

    def _after_layer(self, layer: Any, _inputs: Any, output: Any) -> None:
        if self._doing != FORWARD:  # it is computed again
            return
        hidden = _hidden(output)
        self._calls.append((layer, hidden.requires_grad))
        num_layers = sum(has_gradient for _, has_gradient in self._calls)
        if self._is_uneven and layer is self._layers[-1] and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: self._announce_backward(num_layers))

    def _announce_backward(self, num_layers: int) -> None:
        self._agree(BACKWARD + num_layers)

    def _end(self, _root: Any, _inputs: Any, output: Any) -> None:
        self._doing = NOTHING
        hidden = _hidden(output)
        if hidden.requires_grad:
            hidden.register_hook(self._enter_backward)
        if [layer for layer, _ in self._calls] != self._layers:
            raise ModelError(
                "model.weights: sharded is for models that run each layer once, in order, which this one does not; set "
                "it to device or host."
            )

    def _enter_backward(self, _gradient: torch.Tensor) -> None:
        self._doing = BACKWARD  # as for `fully_shard`, also before the gradient gets to the layers
        # As `fully_shard` itself does; it is not called if the backward is aborted.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._doing = NOTHING

    def _drop_read(self) -> None:
        """Drop the parts of other processes that were gathered to be read."""
        if self._read is not None:
            self._read.reshard()
            self._read = None

    def _gather(self, layer: Any, packed: PackedLayer) -> None:
        """Gather a layer to read it, if that is outside of a pass; all processes read the same."""
        from torch.distributed.tensor import DTensor

        if isinstance(layer.packed_weights.content, DTensor):
            self._drop_read()
            layer.unshard()
            self._read = layer
        if not packed.uses(layer.packed_weights.content):  # the first time
            packed.use(layer.packed_weights.content)


def _hidden(output: Any) -> torch.Tensor:
    """Return the hidden states that a layer or a model of layers returns, by themselves or first."""
    return output if isinstance(output, torch.Tensor) else output[0]


class SplitBytes(nn.Module):
    """The bytes of a layer's packed weights, of which each process has a part.

    Args:
        content: The bytes, (bytes,) uint8.

    Attributes:
        content: The part of this process, or all bytes while the layer is gathered.
    """

    def __init__(self, content: torch.Tensor) -> None:
        super().__init__()
        self.content = nn.Parameter(content, requires_grad=False)


class _CountedGathers:
    """The all-gather that `fully_shard` calls, which counts how often it was.

    Attributes:
        num_issued: Number of all-gathers since it was last set.
    """

    def __init__(self) -> None:
        self.num_issued = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Gather the parts of all processes; the arguments are those of :data:`qlora.processes.all_gather`."""
        self.num_issued += 1
        return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
