"""The most that a device holds while a step runs, measured."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.config import RunConfig
from qlora.data import add_new_tokens, collate, make_example
from qlora.layers.attention import use_document_attention
from qlora.layers.rebuild import rebuild_activations
from qlora.layers.recompute import apply_recompute
from qlora.model.from_config import adapt, base_from_section, optimizer_from_section
from qlora.model.loss import supervised_loss
from qlora.nf4 import NF4Linear
from qlora.optim import FlatOptimizer


def measure_peak(function: Callable[[], object], device: torch.device, held: Iterable[torch.Tensor] = ()) -> int:
    """Runs a function and measures the bytes of tensors on a device.

    On CUDA these are the allocator's; elsewhere those of all storages that operations give, without what kernels take
    for themselves.

    Args:
        function: To run.
        device: To look at.
        held: There before; on CUDA the allocator knows.

    Returns:
        The bytes of all tensors on the device when they were most.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with Storages(device, held) as storages:
        function()
    return storages.peak


class Storages(TorchDispatchMode):
    """While entered, counts the bytes of all storages that operations give, as long as they live.

    Args:
        device: To look at.
        held: Tensors there before.

    Attributes:
        now: Bytes that are alive.
        peak: When they were most.
    """

    def __init__(self, device: torch.device, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._device = device
        self._alive: dict[int, Any] = {}
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device.type:
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def free(_reference: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def prepare(config: RunConfig, device: torch.device) -> Any:
    """Loads a run's model as it would be trained, but for its level of recomputation.

    Raises:
        ModelError: The base can't be loaded.
    """
    model, tokenizer = base_from_section(config.model, device)
    adapt(model, config.lora, config.train.seed, add_new_tokens(tokenizer, config.data.new_tokens))
    if config.model.attention == "auto":
        use_document_attention(model)
    rebuild_activations(model)
    return model.train()


def measure_step(model: Any, config: RunConfig, level: str) -> int:
    """Measures an optimizer step of the largest micro-batch that a config allows for.

    Args:
        model: As :func:`prepare` gives it; it is trained on random tokens, so that no data are needed.
        config: Of the run.
        level: Of recomputation.

    Returns:
        See :func:`measure_peak`.

    Raises:
        ModelError: The model can't have the level.
    """
    section = config.train
    apply_recompute(model, level)
    optimizer = optimizer_from_section(model, section)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (section.micro_batch_size, config.data.max_seq_len)).tolist()
    batch = collate([make_example(row, [True] * len(row)) for row in ids], packed=config.data.packing)
    batch = batch.to(model.device)

    def step() -> None:
        optimizer.flat.zero_grad()
        supervised_loss(model, batch).backward()
        optimizer.step(section.learning_rate)

    step()  # once before, for what is taken at first use and then kept
    return measure_peak(step, model.device, _tensors(model, optimizer))


def _tensors(model: Any, optimizer: FlatOptimizer) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers(), optimizer.flat.data, optimizer.flat.grad]
    tensors += [state for name, state in optimizer.state_dict().items() if name not in ("generator", "step")]
    for module in model.modules():
        if isinstance(module, NF4Linear):
            state = module.quant_state
            tensors += [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    return tensors
