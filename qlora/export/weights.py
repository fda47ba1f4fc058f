"""The merged weights of an adapter and its base, computed one tensor at a time from their files."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from qlora.checkpoint import PeftAdapter, StoredRows
from qlora.checkpoint.adapter_experts import experts_problems
from qlora.checkpoint.adapter_rows import are_shared
from qlora.checkpoint.peft_folder import WEIGHTS_FILE
from qlora.errors import ExportError, ModelError
from qlora.export.card import public_name
from qlora.export.experts import MergedExperts
from qlora.files.headers import read_header
from qlora.files.shards import TensorLayout
from qlora.files.stored import BLOCK_NUMEL, StoredTensors, row_blocks
from qlora.kernels import LowRank, fold, row_norms, row_scale
from qlora.lora import embedding_and_head
from qlora.model import (
    BITSANDBYTES_4BIT,
    AdapterSource,
    BaseWeights,
    build_skeleton,
    has_codes,
    resolve_device,
    subtracted,
    weight_format,
)
from qlora.model.expert_files import expert_tensors
from qlora.model.mergeable import mergeable_tensors
from qlora.model.names import embedding_and_head_tensors, names_in_files, transposed_modules
from qlora.model.score import head_shapes, vocabulary_head
from qlora.model.text_only import names_as_text
from qlora.nf4 import dequantize, dequantize_rows, quantize_rows

ONTO = ("dequantized", "original")


class MergedWeights:
    """The tensors of the merged model by their names in the base's files, in fp32, each computed on demand.

    Devices may quantize differently: a GPU's kernel can give other codes than the CPU's. The weights are equal to
    those of training, bit for bit, only on the kind of device that the run was trained on.

    Args:
        source: The adapter and its base.
        onto: Base weights to merge onto: `dequantized`, those that the adapter was trained on, or `original`.
        device: Device to compute on: `cpu`, `cuda`, or `auto` for a GPU if there is one. None for the kind of device
            that the run was trained on, or the CPU if this machine has none.
        force: Accept a base other than the one used in training, if it has the adapter's shapes.

    Attributes:
        base_differs: Files of the base that differ from those used in training; empty without `force`.
        architecture: Name of the model's class in transformers.
        names_as_text: Names that the base's tensors have in a model of text alone, by their own.

    Raises:
        ExportError: The base is not the one used in training, or `onto` is unknown or not available.
        CheckpointError: The run or its adapter is damaged.
        ModelError: The base can't be found, its files don't hold a layer's weight as a tensor of its own, or the device
            is not available.
    """

    def __init__(
        self, source: AdapterSource, onto: str, device: str | torch.device | None = None, force: bool = False
    ) -> None:
        if onto not in ONTO:
            raise ExportError(f"onto: {onto!r} should be one of {', '.join(ONTO)}.")
        self.source, self._force = source, force
        self._trained_on = source.trained_on
        self.device = _device_here(self._trained_on or "cpu") if device is None else resolve_device(device)
        self.files = source.base_files()
        self.base_differs = source.base_differs(self.files)
        if self.base_differs and not force:
            raise ExportError(
                f"{self.files.name} is not the base used in training: {', '.join(self.base_differs)} differ. Restore "
                "the earlier files, train on the current ones, or merge anyway with --force."
            )
        if onto == "original" and weight_format(self.files) == BITSANDBYTES_4BIT:
            raise ExportError(f"{self.files.name} has only 4-bit weights; merge --onto dequantized.")
        self._compute_dtype = source.compute_dtype(self.device)
        adapter = source.read()
        self._layers, self._onto, self._starts = adapter.layers, onto, source.starts()
        path = source.folder / WEIGHTS_FILE
        self._trained = StoredTensors({path: read_header(path)})  # read by rows, because an embedding is large
        self._base = BaseWeights(self.files)
        skeleton = build_skeleton(self.files, source.trust_remote_code, source.head)
        self.architecture = type(skeleton).__name__
        self.names_as_text = names_as_text(skeleton, self._base.shapes)
        self._shapes = dict(self._base.shapes)
        self._scores: dict[str, tuple[int, ...]] = {}
        if source.head is not None:
            left_out = vocabulary_head(self.files, self._shapes, source.trust_remote_code)
            self._shapes = {name: shape for name, shape in self._shapes.items() if name not in left_out}
            self._scores = head_shapes(skeleton)
            self._shapes |= self._scores
        self._transposed = transposed_modules(skeleton)
        self._embedding, self._head = embedding_and_head_tensors(skeleton, self._shapes)
        self._adapted = self._by_name_in_files(self._layers, skeleton)
        self._rows = self._rows_by_name_in_files(adapter, skeleton)
        for name, rows in self._rows.items():
            (size, *features), given = self._shapes[name], self._trained.shape(rows.tensor)
            if [*given[1:]] != features or rows.ids.start > size:
                raise ExportError(
                    f"{name}: the adapter has rows {rows.ids.start} to {rows.ids.stop - 1} of the shape {given[1:]}, "
                    f"the base {size} rows of {tuple(features)}; take the base and adapter of the same run."
                )
            self._shapes[name] = (max(size, rows.ids.stop), *features)
        quantized = source.quantized(self.files) if onto == "dequantized" else ()
        experts = expert_tensors(skeleton, self._shapes, self.files.name)
        if problems := experts_problems(skeleton, adapter.experts):
            raise ExportError("\n".join(problems))
        self._experts = MergedExperts(
            self._base, experts, [name for name in quantized if name in experts], adapter.experts, self.device,
            self._compute_dtype, source.double_quant, source.block_size,
        )  # fmt: skip
        self._quantized = self._by_name_in_files([name for name in quantized if name not in experts], skeleton)
        self._num_experts = len(adapter.experts)
        self._check_factors()

    @property
    def num_adapted(self) -> int:
        """Number of weights that an adapter is merged into."""
        return len(self._adapted) + self._num_experts

    @property
    def notes(self) -> list[str]:
        """Ways in which these may differ from the weights that the adapter was trained on."""
        here, then = self.device.type, self._trained_on
        if then is None:
            return self._notes_on_base()
        if then == here or all(map(self._base.is_4bit, self._quantized)):
            return []
        return [
            f"quantized a second time on {here}, but the run was trained on {then}: a few weights may have other "
            f"codes; --device {then} uses the same kernels"
        ]

    def _notes_on_base(self) -> list[str]:
        """Return what is assumed about the base of an adapter made elsewhere."""
        assumed = "the original ones" if self._onto == "original" else "NF4 with qlora's default settings"
        notes = [f"the base weights that the adapter was trained on are not known; assumed are {assumed}"]
        if self.source.is_base_named:
            notes.append(f"the base {public_name(self.source.base)[0]} is the one that adapter_config.json names")
        return notes

    @property
    def has_own_head(self) -> bool:
        """Whether the files have a head over the vocabulary that differs from the embedding."""
        if self._embedding is None or self._head is None or self.source.head is not None:
            return False
        if self._shapes[self._embedding] != self._shapes[self._head]:
            return True
        return not all(map(torch.equal, self.blocks(self._embedding), self.blocks(self._head)))

    @property
    def num_embeddings(self) -> int | None:
        """Number of rows of embedding and head if tokens were added; None if it is the base's number."""
        longer = [
            self._shapes[name][0]
            for name in self._rows
            if name in self._base.shapes and name not in self._scores and self._shapes[name] != self._base.shapes[name]
        ]
        return longer[0] if longer else None

    def layout(self, dtype: torch.dtype) -> list[TensorLayout]:
        """Return the layout of all tensors in the order of the base's files; integers keep their dtype."""
        return [
            TensorLayout(name, shape, dtype if self._is_floating_point(name) else self._base.dtype(name))
            for name, shape in self._shapes.items()
        ]

    def _is_floating_point(self, name: str) -> bool:
        return name not in self._base.shapes or self._base.is_floating_point(name)

    def blocks(self, name: str, on_base: Callable[[torch.Tensor], None] | None = None) -> Iterator[torch.Tensor]:
        """Yield one tensor of the merged model in blocks of its rows, in order.

        Args:
            name: Name of the tensor.
            on_base: Called with the first block of an adapted linear layer's weight without its update, just before
                the merged block.

        Yields:
            Rows in fp32 on the device; integers as they are stored.
        """
        if name in self._experts:
            yield from self._experts.blocks(name)
            return
        base = self._dequantized(name)
        module = self._adapted.get(name)
        magnitude = None if module is None else self._layers[module].magnitude
        if magnitude is None:
            yield from self._summed(name, base, on_base)
            return
        magnitude = magnitude.to(self.device)
        if module not in self._transposed:
            for rows, block in zip(row_blocks(self._shapes[name]), self._summed(name, base, on_base), strict=True):
                yield block.mul_(row_scale(magnitude[rows], row_norms(block))[:, None])
            return
        norms = torch.stack([row_norms(block, dim=0) for block in self._summed(name, base)]).norm(dim=0)
        for block in self._summed(name, base, on_base):
            yield block.mul_(row_scale(magnitude, norms))

    def _summed(
        self,
        name: str,
        base: Callable[[slice], torch.Tensor] | None,
        on_base: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield blocks of the rows of a tensor with its updates, before DoRA scales it.

        Args:
            name: Name of the tensor.
            base: Result of :meth:`_dequantized`.
            on_base: See :meth:`blocks`.
        """
        deltas = self._deltas(name)
        for rows in row_blocks(self._shapes[name]):
            stored = self._read_rows(name, rows) if base is None else base(rows)
            if on_base is not None and deltas and not rows.start:
                on_base(stored)
            # A copy, because the update is added in place, and the base may be read again.
            dtype = torch.float32 if stored.is_floating_point() else stored.dtype
            block = stored.to(self.device, dtype, copy=True)
            yield fold(block, [delta.rows(rows) for delta in deltas], out=block)

    def tensor(self, name: str, on_base: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """Return one tensor of the merged model, fp32; integers as they are stored. See :meth:`blocks`."""
        whole, start = torch.empty(0), 0
        for block in self.blocks(name, on_base):
            if block.shape == self._shapes[name]:
                return block
            if not start:
                whole = block.new_empty(self._shapes[name])
            whole[start : start + len(block)] = block
            start += len(block)
        return whole

    def _dequantized(self, name: str) -> Callable[[slice], torch.Tensor] | None:
        """Return a function that gives rows of a weight as training used it, in the compute dtype.

        With double quantization the statistics of a block depend on those of all others, so all of the weight is
        quantized before its first row is dequantized.

        Returns:
            The function; None for a weight that is used as stored in the files.
        """
        if self._base.is_4bit(name):
            return dequantize_rows(*self._base.read_4bit(name, self.device), self._compute_dtype)
        if name not in self._quantized:
            return None
        module, source = self._quantized[name], self.source
        start = self._starts.get(module)
        is_transposed = module in self._transposed
        if is_transposed or start is not None or self.device.type != "cpu":
            whole = self._base.read(name).to(self.device)
            blocks = iter([subtracted(whole.T if is_transposed else whole, start)])
        else:
            parts = row_blocks(self._shapes[name], BLOCK_NUMEL * torch.get_num_threads())
            blocks = (self._base.read(name, rows).to(self.device) for rows in parts)
        shape = self._shapes[name][::-1] if is_transposed else self._shapes[name]
        packed, state = quantize_rows(
            (block.to(self._compute_dtype) for block in blocks), shape, source.double_quant, source.block_size
        )
        is_comparable = self.device.type == source.trained_on and not self._force
        if start is not None and is_comparable and not has_codes(start, packed):
            raise ExportError(
                f"{name}: the base has other 4-bit codes than the one that the run's adapter starts from; restore the "
                "base that it was trained on."
            )
        if is_transposed:
            return dequantize(packed, state, self._compute_dtype).T.__getitem__
        return dequantize_rows(packed, state, self._compute_dtype)

    def _deltas(self, name: str) -> tuple[LowRank, ...]:
        """Return the adapter's updates of a tensor, in fp32 and in the tensor's orientation; empty if it has none."""
        if name not in self._adapted:
            return ()
        module = self._adapted[name]
        deltas = [self._layers[module].delta]
        start = self._starts.get(module)
        if self._onto == "original" and start is not None and start.first is not None:
            # The original weights lack no part that the initial values make up for.
            deltas.append(LowRank(start.first.A, start.first.B, -start.first.scaling))
        on_device = (delta.to(self.device).to(torch.float32) for delta in deltas)
        return tuple(delta.T if module in self._transposed else delta for delta in on_device)

    def _read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor that is not quantized: trained rows from the adapter, the others from the base."""
        if name not in self._rows:
            return self._base.read(name, rows)
        tensor, ids = self._rows[name].tensor, self._rows[name].ids
        first, last, _ = rows.indices(self._shapes[name][0])
        start, stop = (min(max(bound, first), last) for bound in (ids.start, ids.stop))
        parts = [self._trained.read(tensor, slice(start - ids.start, stop - ids.start))]
        if first < start:  # a head of scores has no rows in the base
            parts.insert(0, self._base.read(name, slice(first, start)))
        if stop < last:
            parts.append(self._base.read(name, slice(stop, last)))
        return torch.cat([part.float() for part in parts])

    def _check_factors(self) -> None:
        """Check that every update has the shape of its weight; raises ExportError otherwise."""
        for name, module in self._adapted.items():
            stored = self._layers[module]
            rows, columns = len(stored.B), stored.A.shape[1]
            shape = (columns, rows) if module in self._transposed else (rows, columns)
            if name == self._head:
                raise ExportError(f"LoRA on the output head {module} can't be merged, only rows of it trained in full.")
            if shape != self._shapes[name]:
                raise ExportError(
                    f"{name}: the adapter is for a shape of {shape}, the base has {self._shapes[name]}; take the base "
                    "and adapter of the same run."
                )

    def _rows_by_name_in_files(self, adapter: PeftAdapter, skeleton: Any) -> dict[str, StoredRows]:
        """Return trained rows by the names in the files; those of a shared weight under each name it is stored by.

        Raises:
            ExportError: A module other than embedding and head was trained in full, or the bias of a head over the
                vocabulary was.
        """
        names = embedding_and_head(skeleton)
        one_to_one, _ = names_in_files(skeleton, self._shapes)
        rows, modules = adapter.rows, list(adapter.rows)
        if others := sorted({*rows} - {*names}):
            raise ExportError(f"{', '.join(others)} was trained in full, but only {' and '.join(names)} can be merged.")
        if are_shared(skeleton, rows, adapter.tensors):
            rows = dict.fromkeys(names, next(iter(rows.values())))
            modules = [module for module in rows if f"{module}.weight" in one_to_one]
        biases: dict[str, StoredRows] = {}
        for module, stored in rows.items():
            if stored.bias is None:
                continue
            if f"{module}.bias" in self._scores:
                biases[f"{module}.bias"] = StoredRows(stored.bias, stored.ids)
                continue
            bias = adapter.tensors[stored.bias]
            if not torch.equal(self._base.read(one_to_one[f"{module}.bias"]).to(bias.dtype), bias):
                raise ExportError(f"{module} has a trained bias, which can't be merged; train its weight alone.")
        return {name: rows[module] for name, module in self._by_name_in_files(modules, skeleton).items()} | biases

    def _by_name_in_files(self, modules: Iterable[str], skeleton: Any) -> dict[str, str]:
        """Return modules by the names of their weights in the files."""
        tensors = mergeable_tensors(skeleton, self._shapes, modules, self.files.name)
        return {tensor: module for module, tensor in tensors.items()}


def _device_here(kind: str) -> torch.device:
    try:
        return resolve_device(kind)
    except ModelError:
        return torch.device("cpu")
