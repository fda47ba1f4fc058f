"""The merged weights of a run, computed a second time by other code than merge's."""

import re
from collections.abc import Callable
from typing import Any

import torch

from qlora.checkpoint import PeftAdapter, read_adapter
from qlora.checkpoint.adapter_rows import are_shared
from qlora.config import load_config
from qlora.files import BaseFiles
from qlora.lora import embedding_and_head
from qlora.lora.mixture import experts_per_token
from qlora.model import AdapterSource, BaseWeights, build_skeleton
from qlora.model.expert_files import expert_tensors
from qlora.model.names import names_in_files, transposed_modules
from qlora.model.score import head_shapes, vocabulary_head
from qlora.model.text_only import names_as_text
from qlora.nf4 import dequantize, quantize
from qlora.proof.experts import ExpectedExperts


class ExpectedWeights:
    """The merged weights of an adapter and its base, by their names in the base's files, in fp64.

    The base's files are read, quantized and dequantized as in training. A run's scaling comes from its config, not
    from the adapter. :class:`qlora.export.weights.MergedWeights` adds updates in fp32, this class in fp64.

    Args:
        source: The adapter and its base.
        base: Files of the base.
        onto: Base weights that were merged onto, `dequantized` or `original`.
        device: Device to quantize on, the same kind as the merge's.

    Attributes:
        names: Names of the tensors, in the base's order.
        names_as_text: Names that they have in a model of text alone, by their own.
        compute_dtype: Dtype that the run's weights were dequantized to.
        unplaced: Names of the adapted modules whose weight is not a tensor of the base's files.
        experts: The experts of a mixture among them.
    """

    def __init__(self, source: AdapterSource, base: BaseFiles, onto: str, device: torch.device) -> None:
        self._source, self._onto, self._device = source, onto, device
        self.compute_dtype = source.compute_dtype(device)
        self._base = BaseWeights(base)
        self.names = list(self._base.shapes)
        skeleton = build_skeleton(base, source.trust_remote_code, source.head)
        self._scores: dict[str, tuple[int, ...]] = {}
        if source.head is not None:
            # The head over the vocabulary makes place for the trained one.
            self._scores = head_shapes(skeleton)
            left_out = {*vocabulary_head(base, self.names, source.trust_remote_code), *self._scores}
            self.names = [name for name in self.names if name not in left_out] + [*self._scores]
        adapter = read_adapter(source.folder)
        self._scaling_of = _scaling_rule(source, adapter)
        modules = {
            name: parameter.removesuffix(".weight")
            for parameter, name in names_in_files(skeleton, self.names)[0].items()
        }
        self._modules = modules
        self.names_as_text = names_as_text(skeleton, self.names)
        self._layers = {name: adapter.layers[module] for name, module in modules.items() if module in adapter.layers}
        self.unplaced = sorted({*adapter.layers} - {modules[name] for name in self._layers})
        self._trained = _trained_rows(adapter, skeleton)
        self._trained = {name: self._trained[module] for name, module in modules.items() if module in self._trained}
        self._starts = source.starts()
        self._quantized = {*source.quantized(base)} if onto == "dequantized" else set()
        self.experts = ExpectedExperts(
            self._base, expert_tensors(skeleton, self.names, base.name), self._quantized, adapter.experts,
            _scaling_of_experts(source, skeleton, self._scaling_of), device, self.compute_dtype, source.double_quant,
        )  # fmt: skip
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
        return name in self._layers or self.experts.is_adapted(name)

    def has_trained_rows(self, name: str) -> bool:
        """Return whether rows of a tensor were trained in full."""
        return name in self._trained

    def base(self, name: str) -> torch.Tensor | None:
        """Return a whole dequantized weight, as training used it; None for a weight that is used as in the files."""
        if self._base.is_4bit(name):
            return dequantize(*self._base.read_4bit(name, self._device), self.compute_dtype).cpu()
        if self.experts.is_quantized(name):
            return self.experts.base_weight(name)
        if self._onto == "original" or self._modules.get(name) not in self._quantized:
            return None
        weight = self._base.read(name)
        weight = weight.T if name in self._transposed else weight
        if (start := self._starts.get(self._modules[name])) is not None and start.subtracted is not None:
            term = start.subtracted
            weight = (weight.double() - term.scaling * (term.B.double() @ term.A.double())).float()
        weight = weight.to(self._device, self.compute_dtype)
        packed = quantize(weight, self._source.double_quant, self._source.block_size)
        weight = dequantize(*packed, self.compute_dtype).cpu()
        return weight.T if name in self._transposed else weight

    def shape(self, name: str, base: torch.Tensor | None) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Args:
            name: Name of the tensor.
            base: Result of :meth:`base`.
        """
        if name in self._trained:
            ids, trained = self._trained[name]
            size = 0 if name in self._scores else self._base.shapes[name][0]
            return max(size, ids.stop), *trained.shape[1:]
        return self._base.shapes[name] if base is None else tuple(base.shape)

    def rows(self, name: str, rows: slice, base: torch.Tensor | None) -> torch.Tensor:
        """Return rows of a base weight, with those trained in full: in fp64; integers as they are stored."""
        if name in self._trained and name in self._scores:
            return self._trained[name][1][rows].double()
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
        if name in self.experts:
            return self.experts.update(name, rows)
        update, bound = self._low_rank(name, rows)
        magnitude, weight = self._layers[name].magnitude, self.rows(name, rows, base)
        # A matrix product may add its terms to the weight one after the other, so that each sum has the weight's size.
        bound = bound + weight.abs() * self._layers[name].A.shape[0] * 2.0**-24
        if magnitude is None:
            return update, bound
        if name in self._transposed:
            everything = slice(0, None)
            whole = self.rows(name, everything, base) + self._low_rank(name, everything)[0]
            scale = magnitude.double() / whole.norm(dim=0)
        else:
            scale = (magnitude[rows].double() / (weight + update).norm(dim=1))[:, None]
        scaled = scale.where(scale.isfinite(), 1.0) * (weight + update)  # rows of zeros stay as they are
        # The sum of squares, its root, the quotient and the product are rounded too.
        return scaled - weight, scale.abs().nan_to_num(1.0) * bound + scaled.abs() * 2.0**-20

    def _low_rank(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of scaling · B A in fp64, and of a bound on the error of its sums in fp32."""
        lora_A, lora_B, scaling = self._layers[name].A, self._layers[name].B, self._scaling_of(self._modules[name])
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


def _scaling_rule(source: AdapterSource, adapter: PeftAdapter) -> Callable[[str], float]:
    """Return the factor on B A by module; implements formula and patterns a second time, on purpose."""
    if source.run is None:
        own = adapter.config
        rank, alpha, rslora = own["r"], own["lora_alpha"], own.get("use_rslora")
        patterns = own.get("rank_pattern") or {}, own.get("alpha_pattern") or {}
    else:
        lora = load_config(source.run.config).lora
        if lora.kind == "rows":
            return lambda _module: 1.0
        rank, alpha, rslora = lora.rank, lora.alpha, lora.rslora
        patterns = lora.rank_pattern, lora.alpha_pattern

    def scaling_of(module: str) -> float:
        own_rank, own_alpha = (
            next((value for key, value in pattern.items() if re.search(rf"(^|\.)({key})$", module)), default)
            for pattern, default in zip(patterns, (rank, alpha), strict=True)
        )
        return own_alpha * own_rank**-0.5 if rslora else own_alpha / own_rank

    return scaling_of


def _scaling_of_experts(
    source: AdapterSource, skeleton: Any, scaling_of: Callable[[str], float]
) -> Callable[[str], float]:
    """Return the factor on B A by stack of experts; in a run it is that of layers unless a pattern is for the stack.

    It follows from the config's rank of experts. A stack that started from an adapter may have a higher one.
    """
    if source.run is None:
        return scaling_of
    lora = load_config(source.run.config).lora
    power = -0.5 if lora.rslora else -1.0

    def scaling_of_stack(name: str) -> float:
        alphas, ranks = (
            [value for key, value in pattern.items() if re.search(rf"(^|\.)({key})$", name)]
            for pattern in (lora.alpha_pattern, lora.rank_pattern)
        )
        if ranks:
            return float((alphas or [lora.alpha])[0] * ranks[0] ** power)
        if alphas:
            asked = lora.expert_rank
            rank = max(1, lora.rank // experts_per_token(skeleton)) if asked == "auto" else int(asked)
            return float(alphas[0] * rank**power)
        return float(lora.alpha * lora.rank**power)

    return scaling_of_stack


def _trained_rows(adapter: PeftAdapter, skeleton: Any) -> dict[str, tuple[range, torch.Tensor]]:
    """Return ids and values of the rows trained in full, by module; shared ones for both modules."""
    trained = {module: (rows.ids, adapter.tensors[rows.tensor]) for module, rows in adapter.rows.items()}
    biases = {f"{module}.bias": (rows.ids, rows.bias) for module, rows in adapter.rows.items() if rows.bias}
    if are_shared(skeleton, adapter.rows, adapter.tensors):
        trained = dict.fromkeys(embedding_and_head(skeleton), next(iter(trained.values())))
    return trained | {name: (ids, adapter.tensors[bias]) for name, (ids, bias) in biases.items()}
