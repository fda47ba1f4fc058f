"""The merged weights of a run, one tensor at a time, from the base's files and the adapter."""

import difflib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora.checkpoint import BaseFiles, RunDirectory, read_adapter_config, read_adapter_tensors
from qlora.config import RunConfig, load_config
from qlora.errors import ExportError
from qlora.export.shards import DTYPE_NAMES, TensorLayout
from qlora.model import build_skeleton
from qlora.nf4 import dequantize, from_checkpoint_tensors, quantize

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class MergedWeights:
    """Every tensor of the merged model by its name in the base's files, in fp32, computed when asked for.

    Args:
        run: A finished run.
        onto: `dequantized`, the weights that the adapter was trained on, or `original`.

    Raises:
        ExportError: The run is not finished, the base is not the one trained on, or its files lack adapted modules.
        CheckpointError: The run or its adapter is damaged.
        ModelError: The base can't be found.
    """

    def __init__(self, run: RunDirectory, onto: str) -> None:
        self.record = run.read_record()
        self.config: RunConfig = load_config(run.config)
        if self.record["status"] != "finished":
            raise ExportError(f"{run.path} is {self.record['status']}, not finished; qlora train continues it.")
        model = self.config.model
        self.files = BaseFiles.resolve(model.base, model.revision, model.trust_remote_code)
        differing = self.files.differing(self.record["base"]["files"])
        if differing:
            raise ExportError(
                f"{self.files.name} is not the base that was trained on: {', '.join(differing)} differ. "
                "Put the files of that time back, or train on these."
            )
        if onto == "original" and self.files.is_bitsandbytes_4bit:
            raise ExportError(f"{self.files.name} holds 4-bit weights alone; merge --onto dequantized.")
        self.onto = onto
        self._compute_dtype = getattr(torch, self.record["in_use"]["compute_dtype"])
        self._scaling = adapter_scaling(read_adapter_config(run.adapter))
        skeleton = build_skeleton(self.files, self.config.model.trust_remote_code)
        self._transposed = _transposed_modules(skeleton)
        factors = read_adapter_tensors(run.adapter)
        self._factors = dict(zip(self._keys_of(factors, skeleton.base_model_prefix), factors.items(), strict=True))
        quantized = self.record["parameters"]["quantized"]
        self._quantized = dict(zip(self._keys_of(quantized, skeleton.base_model_prefix), quantized, strict=True))
        self._handles: dict[Path, Any] = {}

    @property
    def num_adapted(self) -> int:
        """Weights that the adapter changes."""
        return len(self._factors)

    def layout(self, dtype: torch.dtype) -> list[TensorLayout]:
        """All tensors in the order of the base's files; what is no floating-point number keeps its dtype."""
        layout = []
        for name in self.files.tensors:
            if f"{name.rpartition('.weight.')[0]}.weight.absmax" in self.files.tensors:
                continue  # statistics of a weight in 4 bits
            shape, stored = self.files.shape(name), self.files.dtype_name(name)
            if shape is None:
                layout.append(TensorLayout(name, self._packed_shape(name), dtype))
            else:
                layout.append(TensorLayout(name, shape, dtype if "F" in stored else DTYPES[stored]))
        return layout

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the merged model, fp32; what is no floating-point number as it is stored."""
        module, factors = self._factors.get(name, (None, None))
        weight = self._base_tensor(name)
        if factors is None:
            return weight
        lora_A, lora_B = factors
        delta = (lora_B.float() @ lora_A.float()).mul_(self._scaling)
        if module in self._transposed:
            delta = delta.T
        if delta.shape != weight.shape:
            raise ExportError(f"{name}: the adapter is for {tuple(delta.shape)}, the base has {tuple(weight.shape)}.")
        return weight + delta

    def _base_tensor(self, name: str) -> torch.Tensor:
        """A tensor as the adapter saw it in training, or as it is in the files; fp32."""
        packed = self._read_packed(name)
        if packed is not None:
            return dequantize(*packed, self._compute_dtype).float()
        stored = self._read(name)
        if self.onto == "original" or name not in self._quantized:
            return stored.float() if stored.is_floating_point() else stored
        is_transposed = self._quantized[name] in self._transposed
        weight = (stored.T if is_transposed else stored).to(self._compute_dtype)
        packed = quantize(weight, self.record["quantization"]["double_quant"])
        weight = dequantize(*packed, self._compute_dtype).float()
        return weight.T if is_transposed else weight

    def _packed_shape(self, name: str) -> tuple[int, ...]:
        packed = self._read_packed(name)
        assert packed is not None
        return tuple(packed[1].shape)

    def _read_packed(self, name: str) -> tuple[torch.Tensor, Any] | None:
        """A weight that the files hold in 4 bits."""
        if f"{name}.absmax" not in self.files.tensors:
            return None
        prefix = name.removesuffix("weight")
        parts = {key.removeprefix(prefix): self._read(key) for key in self.files.tensors if key.startswith(name)}
        return from_checkpoint_tensors(parts)

    def _read(self, name: str) -> torch.Tensor:
        path = self.files.tensors[name]
        if path not in self._handles:
            self._handles = {path: safe_open(path, framework="pt")}
        return self._handles[path].get_tensor(name)

    def _keys_of(self, modules: Any, prefix: str) -> list[str]:
        """Names in the files of modules' weights, which may lack the prefix of the inner model."""
        keys, missing = [], []
        for module in modules:
            candidates = (f"{module}.weight", f"{module.removeprefix(prefix + '.')}.weight")
            key = next((candidate for candidate in candidates if candidate in self.files.tensors), None)
            keys.append(key or "")
            if key is None:
                missing.append(module)
        if missing:
            near = difflib.get_close_matches(f"{missing[0]}.weight", self.files.tensors, n=1)
            hint = f" The nearest name there is {near[0]}." if near else ""
            raise ExportError(
                f"{len(missing)} layers are not in the files of {self.files.name} by their names "
                f"({', '.join(missing[:3])} …), so nothing was merged.{hint} "
                "Load the base with transformers, save it, and train on that."
            )
        return keys


def adapter_scaling(config: dict[str, Any]) -> float:
    """The factor on B A that an adapter's config stands for."""
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def _transposed_modules(skeleton: Any) -> set[str]:
    """Layers of GPT-2's kind, whose weights are stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}
