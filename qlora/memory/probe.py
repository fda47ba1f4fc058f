"""Peak memory of a device while a step runs, measured."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.config import RunConfig
from qlora.config.sections.train import DEFAULT_LEARNING_RATE
from qlora.data import Batch, TokenizedExample, collate, make_example
from qlora.layers.rebuild import rebuild_activations
from qlora.layers.recompute import apply_recompute
from qlora.lora import input_embedding, reads_images
from qlora.model.from_config import base_files, optimizer_from_section, set_tokens, with_images
from qlora.model.initial import load_for_training
from qlora.model.isolation import keep_apart, unpackable_reason
from qlora.model.loss import Loss
from qlora.model.processor import load_processor
from qlora.model.score import last_scores
from qlora.model.starts import Starts
from qlora.nf4 import NF4Experts, NF4Linear
from qlora.optim import FlatOptimizer

# Number of tokens of the example that stands for a run's.
MADE_UP_TOKENS = 64


def measure_peak(function: Callable[[], object], device: torch.device, held: Iterable[torch.Tensor] = ()) -> int:
    """Run a function and measure the bytes of tensors on a device.

    On CUDA the allocator counts them; elsewhere they are the storages that operations return, without the memory that
    kernels use internally.

    Args:
        function: Function to run.
        device: Device to measure.
        held: Tensors that exist before; not needed on CUDA, where the allocator counts them.

    Returns:
        The largest number of bytes that all tensors on the device had at one time.
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
    """Context that counts the bytes of all storages that operations return, as long as these are alive.

    Args:
        device: Device to measure.
        held: Tensors that exist before.

    Attributes:
        now: Bytes that are alive.
        peak: Largest value of `now`.
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


def prepare(
    config: RunConfig, device: torch.device, loss: Loss, starts: Starts | None = None
) -> tuple[Any, RunConfig, Loss]:
    """Load a run's model as it would be trained, except for its level of recomputation.

    Args:
        config: Config of the run.
        device: Device of the model.
        loss: Loss that is minimized.
        starts: What the run's adapters started from; None computes it, from made-up examples if it needs any.

    Returns:
        The model; the config, with how `data.packing` was resolved; and the loss, with what it reads of images.

    Raises:
        ModelError: The base can't be loaded.
    """
    files = base_files(config.model)
    processor = load_processor(files.folder, config.model.trust_remote_code)
    new_ids = set_tokens(config.data, processor)
    loss = with_images(loss, config.data, processor)
    examples = [made_up_document(list(range(min(MADE_UP_TOKENS, config.data.max_tokens))), loss.columns)]
    has_old = config.train.keep is not None and config.train.keep.null_space is not None
    old_examples = examples if starts is None and has_old else None
    model, _ = load_for_training(
        config, device, new_ids, starts, examples, old_examples, is_reference=loss.has_reference, head=loss.head
    )
    packed = config.data.packs and unpackable_reason(model, config.data.max_seq_len) is None
    first = examples[0]
    isolation = keep_apart(
        model, first, make_example(first.input_ids + 1, [True] * len(first), first.values), packed=packed,
        any_attention=config.model.attention == "auto" and not reads_images(model),
        loss_of_last=None if loss.head is None else last_scores,
    )  # fmt: skip
    rebuild_activations(model)
    data = config.data.model_copy(update={"packing": packed and isolation.mixed_reason is None})
    return model.train(), config.model_copy(update={"data": data}), loss


def measure_step(model: Any, config: RunConfig, level: str, loss: Loss) -> int:
    """Measure an optimizer step of the largest micro-batch that a config allows for.

    Args:
        model: Model that :func:`prepare` returned; it is trained on random tokens, so that no data are needed.
        config: Config that it returned.
        level: Level of recomputation.
        loss: Loss that it returned.

    Returns:
        See :func:`measure_peak`.

    Raises:
        ModelError: The model does not support the level.
    """
    section = config.train
    if section.learning_rate == "auto":  # its value takes no memory
        section = section.with_learning_rate(DEFAULT_LEARNING_RATE)
    apply_recompute(model, level)
    optimizer = optimizer_from_section(model, section)
    embedding = input_embedding(model)
    vocabulary = 1 if embedding is None else embedding.num_embeddings
    shape = (section.micro_batch_size * loss.group_size, config.data.max_tokens)
    documents = [made_up_document(ids, loss.columns) for ids in torch.randint(vocabulary, shape).tolist()]
    batch = collate(documents, packed=config.data.packs)
    batch = batch.to(model.device)

    def step() -> None:
        optimizer.flat.zero_grad()
        run_passes(model, batch, loss)
        optimizer.step(section.peak)

    step()  # allocates what is kept after the first use
    return measure_peak(step, model.device, _tensors(model, optimizer))


def made_up_document(ids: list[int], columns: Mapping[str, torch.Tensor]) -> TokenizedExample:
    """Return a document with the values of a loss's columns."""
    return make_example(ids, [True] * len(ids), {name: value.numpy() for name, value in columns.items()})


def run_passes(model: Any, batch: Batch, loss: Loss) -> None:
    """Run forward and backward of every pass of a training step."""
    for computed in loss.training_passes(model, batch):
        computed.total.backward()


def _tensors(model: Any, optimizer: FlatOptimizer) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers(), optimizer.flat.data, optimizer.flat.grad]
    tensors += [state for name, state in optimizer.state_dict().items() if name not in ("generator", "step")]
    for module in model.modules():
        if isinstance(module, NF4Linear | NF4Experts):
            tensors += module.statistics
    return tensors
