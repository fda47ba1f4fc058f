"""A merged folder's tensors against the run's, computed a second time in another way than merge computes them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora.checkpoint import BaseFiles, RunDirectory, read_adapter_tensors
from qlora.config import LoraSection, load_config
from qlora.export.names import names_in_files
from qlora.export.stored import StoredTensors, row_blocks
from qlora.model import build_skeleton
from qlora.nf4 import dequantize, from_checkpoint_tensors, quantize

# Values of a tensor by which it is known when it lies in another's place.
NUM_SAMPLED = 64


@dataclass(slots=True)
class TensorCheck:
    """What became of the comparison.

    Attributes:
        problems: A line for each tensor that is not what it should be.
        checked: Tensors that were compared.
        max_difference: From the unrounded values, over all numbers.
    """

    problems: list[str] = field(default_factory=list)
    checked: int = 0
    max_difference: float = 0.0


class ExpectedWeights:
    """The merged weights of a run, by their names in the base's files, in fp64.

    The base's file is read, quantized and dequantized as in training; the scaling is the config's and not the
    adapter's. Where :class:`qlora.export.weights.MergedWeights` adds in fp32, this adds in fp64.

    Args:
        run: The run.
        base: Its base's files.
        onto: `dequantized` or `original`.
        device: To quantize on, as the merge did.

    Attributes:
        names: Of the tensors, in the base's order.
        unplaced: Adapted modules that no tensor of the base's files is the weight of.
    """

    def __init__(self, run: RunDirectory, base: BaseFiles, onto: str, device: torch.device) -> None:
        config, self._record = load_config(run.config), run.read_record()
        self._onto, self._device = onto, device
        self._dtype = getattr(torch, self._record["in_use"]["compute_dtype"])
        self._scaling = true_scaling(config.lora)
        self._stored = StoredTensors(base.headers)
        self._packed = {name.removesuffix(".absmax") for name in base.tensors if name.endswith(".weight.absmax")}
        self._statistics = {name: [key for key in base.tensors if key.startswith(f"{name}.")] for name in self._packed}
        statistics = {key for keys in self._statistics.values() for key in keys}
        self.names = [name for name in base.tensors if name not in statistics]

        skeleton = build_skeleton(base, config.model.trust_remote_code)
        factors = read_adapter_tensors(run.adapter)
        modules = {
            name: parameter.removesuffix(".weight")
            for parameter, name in names_in_files(skeleton, self.names)[0].items()
        }
        self._modules = modules
        self._factors = {name: factors[module] for name, module in modules.items() if module in factors}
        self.unplaced = sorted({*factors} - {modules[name] for name in self._factors})
        self._quantized = {*self._record["parameters"]["quantized"]}
        self._transposed = {
            name for name, module in modules.items() if type(_module(skeleton, module)).__name__ == "Conv1D"
        }

    def is_adapted(self, name: str) -> bool:
        """Whether an update is added to a tensor."""
        return name in self._factors

    def base(self, name: str) -> torch.Tensor | None:
        """A weight that went through 4 bits, whole, as training saw it; None for one that is as in the files."""
        if name in self._packed:
            keys = [name, *self._statistics[name]]
            parts = {f"weight{key.removeprefix(name)}": self._stored.read(key).to(self._device) for key in keys}
            return dequantize(*from_checkpoint_tensors(parts), self._dtype).cpu()
        if self._onto == "original" or self._modules.get(name) not in self._quantized:
            return None
        weight = self._stored.read(name)
        weight = (weight.T if name in self._transposed else weight).to(self._device, self._dtype)
        settings = self._record["quantization"]
        packed = quantize(weight, settings["double_quant"], settings["block_size"])
        weight = dequantize(*packed, self._dtype).cpu()
        return weight.T if name in self._transposed else weight

    def shape(self, name: str, base: torch.Tensor | None) -> tuple[int, ...]:
        """Of a tensor, whose base weight is given if it went through 4 bits."""
        return self._stored.shape(name) if base is None else tuple(base.shape)

    def rows(self, name: str, rows: slice, base: torch.Tensor | None) -> torch.Tensor:
        """Rows of the base weight: fp64, or as they are stored if they are no floating-point numbers."""
        values = self._stored.read(name, rows) if base is None else base[rows]
        return values.double() if values.is_floating_point() else values

    def update(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of scaling · B A in fp64, and of a bound on what a sum of its products in fp32 can be off by."""
        lora_A, lora_B = self._factors[name]
        left, right = (lora_A.T, lora_B.T) if name in self._transposed else (lora_B, lora_A)
        left, right = left[rows].double() * self._scaling, right.double()
        # Each element is a sum of rank products: Cauchy and Schwarz bound what their absolute values sum up to.
        size = torch.outer(left.norm(dim=1), right.norm(dim=0))
        return left @ right, size * (lora_A.shape[0] + 1) * 2.0**-24


def true_scaling(lora: LoraSection) -> float:
    """The factor on B A that a run trained with."""
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def check_tensors(expected: ExpectedWeights, written: BaseFiles, dtype: torch.dtype) -> TensorCheck:
    """Compares every written tensor, in blocks of its rows, within half a unit of its last place.

    Args:
        expected: What should be there.
        written: The merged folder.
        dtype: That its floating-point tensors should have.
    """
    check, stored, known = TensorCheck(), StoredTensors(written.headers), {*expected.names}
    check.problems += [f"the base's files hold no weight of the adapted layer {name}" for name in expected.unplaced]
    check.problems += [f"tensor {name} is missing" for name in expected.names if name not in stored]
    check.problems += [f"tensor {name} is not in the base" for name in written.tensors if name not in known]
    comparisons = [_compare(expected, stored, name, dtype) for name in expected.names if name in stored]
    check.problems += [problem for each in comparisons if (problem := each.problem(comparisons))]
    check.checked = len(comparisons)
    check.max_difference = max((each.max_difference for each in comparisons), default=0.0)
    return check


def _compare(expected: ExpectedWeights, stored: StoredTensors, name: str, dtype: torch.dtype) -> "_Comparison":
    comparison = _Comparison(name, dtype)
    base = expected.base(name)
    shape = expected.shape(name, base)
    if stored.shape(name) != shape:
        comparison.wrong_kind = f"has the shape {stored.shape(name)}, not {shape}"
        return comparison
    for rows in row_blocks(shape):
        update = expected.update(name, rows) if expected.is_adapted(name) else None
        comparison.add(stored.read(name, rows), expected.rows(name, rows, base), update)
    return comparison


@dataclass(slots=True)
class _Comparison:
    """A written tensor against what it should be, and what helps to say why it is apart.

    Attributes:
        dtype: That it should have, if its numbers are floating-point ones.
        wrong_kind: What is wrong with its shape or dtype.
        sums: Of squares of the base's weights, of what was added to them, and of the update; of the latter two's
            product.
    """

    name: str
    dtype: torch.dtype
    wrong_kind: str = ""
    is_equal: bool = True
    is_adapted: bool = False
    max_difference: float = 0.0
    found: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, found: torch.Tensor, base: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Compares the next rows."""
        wanted = self.dtype if base.is_floating_point() else base.dtype
        if found.dtype != wanted:
            self.wrong_kind = f"is in {_name(found.dtype)}, not {_name(wanted)}"
        expected = base if update is None else base + update[0]
        if self.found is None:
            self.found, self.expected = found.flatten()[:NUM_SAMPLED], expected.flatten()[:NUM_SAMPLED]
        if not base.is_floating_point():
            self.is_equal &= torch.equal(found, base)
            return
        found = found.double()
        difference = (found - expected).abs()
        self.max_difference = max([self.max_difference, *difference.flatten().amax(keepdim=True).tolist()])
        # Only what is not the nearest number outright is looked at: one in thousands, where fp32 rounded first.
        other = found != expected.to(self.dtype).double()
        bound = spacing(expected[other], self.dtype) / 2 + expected[other].abs() * 2.0**-24
        if update is not None:
            self.is_adapted = True
            bound += update[1][other]
            added = found - base
            products = (base * base, added * added, update[0] * update[0], added * update[0])
            self.sums += torch.stack([product.sum() for product in products])
        self.is_equal &= bool((difference[other] <= bound).all())  # of NaN it is false

    def problem(self, others: Iterable["_Comparison"]) -> str | None:
        """What speaks against it, with the mistake that would have made it, if it is one of the known."""
        if self.wrong_kind:
            return f"tensor {self.name} {self.wrong_kind}"
        if self.is_equal:
            return None
        what = "base + scaling·B·A" if self.is_adapted else "the base's"
        return f"tensor {self.name} is not {what}: {self._reason(others)}"

    def _reason(self, others: Iterable["_Comparison"]) -> str:
        for other in others:
            if other.name != self.name and _is_rounded(self.found, other.expected):
                return f"it holds {other.name}"
        base, added, update, along = self.sums.tolist()
        share = along / update if update else 1.0
        rounding = base * (torch.finfo(self.dtype).eps / 2) ** 2
        if added - share * along < 0.01 * update + rounding:  # what was added lies along the update
            if abs(share) < 0.05:
                return "its update is missing"
            if abs(share - 1) > 0.01:
                return f"its update is {share:.3g} times what it should be"
        return f"values differ by up to {self.max_difference:.3g}"


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from numbers to their neighbours in a dtype, fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.double().abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float64), exponent - 1)


def _is_rounded(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """Whether values are others in a narrower dtype."""
    if found is None or expected is None or found.shape != expected.shape or not expected.is_floating_point():
        return False
    return bool(((found.double() - expected).abs() <= spacing(expected, found.dtype)).all())


def _module(skeleton: Any, name: str) -> Any:
    parent, _, last = name.rpartition(".")
    return getattr(skeleton.get_submodule(parent), last, None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
