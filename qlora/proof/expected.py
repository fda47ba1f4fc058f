"""The merged weights of a run, computed a second time by other code than merge's."""

import re
from typing import Any

import torch

from qlora.checkpoint import PeftAdapter, RunDirectory, read_adapter
from qlora.config import load_config
from qlora.files import BaseFiles
from qlora.model import BaseWeights, build_skeleton, starts_of
from qlora.model.names import names_in_files, transposed_modules
from qlora.nf4 import dequantize, quantize


class ExpectedWeights:
    """The merged weights of a run, by their names in the base's files, in fp64.

    The base's files are read, quantized and dequantized as in training. The scaling comes from the config, not from the
    adapter. :class:`qlora.export.weights.MergedWeights` adds updates in fp32, this class in fp64.

    Args:
        run: The run.
        base: Files of its base.
        onto: Base weights that were merged onto, `dequantized` or `original`.
        device: Device to quantize on, the same kind as the merge's.

    Attributes:
        names: Names of the tensors, in the base's order.
        compute_dtype: Dtype that the run's weights were dequantized to.
        unplaced: Names of the adapted modules whose weight is not a tensor of the base's files.
    """

    def __init__(self, run: RunDirectory, base: BaseFiles, onto: str, device: torch.device) -> None:
        config, self._record = load_config(run.config), run.read_record()
        self._onto, self._device = onto, device
        self.compute_dtype = getattr(torch, self._record.in_use.compute_dtype)
        self._lora = config.lora
        self._base = BaseWeights(base)
        self.names = list(self._base.shapes)

        skeleton = build_skeleton(base, config.model.trust_remote_code)
        adapter = read_adapter(run.adapter)
        modules = {
            name: parameter.removesuffix(".weight")
            for parameter, name in names_in_files(skeleton, self.names)[0].items()
        }
        self._modules = modules
        self._layers = {name: adapter.layers[module] for name, module in modules.items() if module in adapter.layers}
        self.unplaced = sorted({*adapter.layers} - {modules[name] for name in self._layers})
        self._trained = _trained_rows(adapter, skeleton, self._record.parameters.shared_rows)
        self._trained = {name: self._trained[module] for name, module in modules.items() if module in self._trained}
        self._starts = starts_of(config, run.adapter)
        self._quantized = {*self._record.parameters.quantized}
        transposed = transposed_modules(skeleton)
        self._transposed = {name for name, module in modules.items() if module in transposed}

    def adapted(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the base weight of an adapted layer and its update, (out, in) and fp64 each."""
        name = next(name for name, other in self._modules.items() if other == module)
        base, rows = self.base(name), slice(0, None)
        weight, update = self.rows(name, rows, base), self.update(name, rows, base)[0]
        return (weight.T, update.T) if name in self._transposed else (weight, update)

    def is_adapted(self, name: str) -> bool:
        """Return whether an update is added to a tensor."""
        return name in self._layers

    def has_trained_rows(self, name: str) -> bool:
        """Return whether rows of a tensor were trained in full."""
        return name in self._trained

    def base(self, name: str) -> torch.Tensor | None:
        """Return a whole dequantized weight, as training used it; None for a weight that is used as in the files."""
        if self._base.is_4bit(name):
            return dequantize(*self._base.read_4bit(name, self._device), self.compute_dtype).cpu()
        if self._onto == "original" or self._modules.get(name) not in self._quantized:
            return None
        weight = self._base.read(name)
        weight = weight.T if name in self._transposed else weight
        if (start := self._starts.get(self._modules[name])) is not None and start.subtracted is not None:
            term = start.subtracted
            weight = (weight.double() - term.scaling * (term.B.double() @ term.A.double())).float()
        weight = weight.to(self._device, self.compute_dtype)
        settings = self._record.quantization
        assert settings.block_size is not None  # because the record has quantized layers
        packed = quantize(weight, settings.double_quant, settings.block_size)
        weight = dequantize(*packed, self.compute_dtype).cpu()
        return weight.T if name in self._transposed else weight

    def shape(self, name: str, base: torch.Tensor | None) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Args:
            name: Name of the tensor.
            base: Result of :meth:`base`.
        """
        if name in self._trained:
            size, features = self._base.shapes[name]
            return max(size, self._trained[name][0].stop), features
        return self._base.shapes[name] if base is None else tuple(base.shape)

    def rows(self, name: str, rows: slice, base: torch.Tensor | None) -> torch.Tensor:
        """Return rows of a base weight, with those trained in full: in fp64; integers as they are stored."""
        values = self._base.read(name, rows) if base is None else base[rows]
        if not values.is_floating_point():
            return values
        if name not in self._trained:
            return values.double()
        ids, trained = self._trained[name]
        places = torch.arange(rows.start, rows.stop)
        found = torch.full((len(places), trained.shape[1]), torch.nan, dtype=torch.float64)
        found[: len(values)] = values.double()
        is_trained = (places >= ids.start) & (places < ids.stop)
        found[is_trained] = trained[places[is_trained] - ids.start].double()
        return found

    def update(self, name: str, rows: slice, base: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of what is added to a base weight W, in fp64, and of a bound on the error of its sums in fp32.

        It is U = scaling · B A; with DoRA it is c ∘ (W + U) − W, with c = magnitude / ‖W + U‖.

        Args:
            name: Name of the tensor.
            rows: The rows.
            base: Result of :meth:`base`.
        """
        update, bound = self._low_rank(name, rows)
        magnitude = self._layers[name].magnitude
        if magnitude is None:
            return update, bound
        weight = self.rows(name, rows, base)
        if name in self._transposed:
            everything = slice(0, None)
            whole = self.rows(name, everything, base) + self._low_rank(name, everything)[0]
            scale = magnitude.double() / whole.norm(dim=0)
        else:
            scale = (magnitude[rows].double() / (weight + update).norm(dim=1))[:, None]
        scaled = scale * (weight + update)
        # The sum of squares, its root, the quotient and the product are rounded too.
        return scaled - weight, scale.abs() * bound + scaled.abs() * 2.0**-20

    def _low_rank(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of scaling · B A in fp64, and of a bound on the error of its sums in fp32."""
        lora_A, lora_B, scaling = self._layers[name].A, self._layers[name].B, self._scaling(self._modules[name])
        start = self._starts.get(self._modules[name])
        if self._onto == "original" and start is not None and start.first is not None:
            # Only what training added: the original weights need none of what the quantization lost.
            first = start.first
            lora_A = torch.cat([lora_A.double(), first.A.double()])
            lora_B = torch.cat([lora_B.double(), -first.B.double() * first.scaling / scaling], dim=1)
        left, right = (lora_A.T, lora_B.T) if name in self._transposed else (lora_B, lora_A)
        left, right = left[rows].double() * scaling, right.double()
        # Each element is a sum of rank products; Cauchy-Schwarz bounds the sum of their absolute values.
        size = torch.outer(left.norm(dim=1), right.norm(dim=0))
        return left @ right, size * (lora_A.shape[0] + 1) * 2.0**-24

    def _scaling(self, module: str) -> float:
        """Return the factor on B A from the config; implements formula and patterns a second time, on purpose."""
        own = self._lora
        if own.kind == "rows":
            return 1.0
        rank, alpha = (
            next((value for key, value in patterns.items() if re.search(rf"(^|\.)({key})$", module)), default)
            for patterns, default in ((own.rank_pattern, own.rank), (own.alpha_pattern, own.alpha))
        )
        return alpha * rank**-0.5 if own.rslora else alpha / rank


def _trained_rows(adapter: PeftAdapter, skeleton: Any, are_shared: bool) -> dict[str, tuple[range, torch.Tensor]]:
    """Return ids and values of the rows trained in full, by module; for both modules if embedding and head are tied."""
    trained = {module: (rows.ids, adapter.tensors[rows.tensor]) for module, rows in adapter.rows.items()}
    if are_shared and trained:
        both = {skeleton.get_input_embeddings(), skeleton.get_output_embeddings()}
        names = [name for name, module in skeleton.named_modules() if module in both]
        trained = {name: next(iter(trained.values())) for name in names}
    return trained
