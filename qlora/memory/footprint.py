"""Bytes that a run takes at each level of recomputation, computed from its config and the base's config."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.checkpoint.peft_folder import WEIGHTS_FILE
from qlora.config import RunConfig
from qlora.data import add_new_tokens
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.lora import AdapterSpec, head_blocks, output_head, stored_head, train_rows, trained_rows
from qlora.lora.experts import factor_shapes
from qlora.lora.host_rows import rows_for_host
from qlora.lora.mixture import ExpertStack, expert_stacks, experts_per_token
from qlora.memory.meta_layers import Stack, set_attention
from qlora.memory.meta_step import trace_levels
from qlora.memory.passes import Passes, count_passes
from qlora.memory.timeline import Moment
from qlora.model import (
    BITSANDBYTES_4BIT,
    Loss,
    adapter_spec,
    adapter_specs,
    build_skeleton,
    check_base,
    expert_specs,
    load_tokenizer,
    positions_of,
    read_config,
    unpackable_reason,
    weight_format,
)
from qlora.model.formats import expert_type
from qlora.model.null_space import MOST_DIRECTIONS
from qlora.model.quantization import quantized_names
from qlora.model.shares import linear_weights
from qlora.model.skeleton import of_images
from qlora.nf4 import BLOCK_SIZE, MXFP4, MXFP4_BLOCK_SIZE, NESTED_BLOCK_SIZE
from qlora.optim import FlatParameters, make_optimizer

FP32_BYTES = 4
CAUSAL_TASKS = ("CausalLM", "ConditionalGeneration")
# A tensor of an adapter: the adapter's spec, the tensor's name and its shape.
Values = tuple[AdapterSpec, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a run, without those that the device itself takes.

    Attributes:
        weights: Bytes of the base.
        adapters: Bytes of factors, of rows trained in full, and of their flat gradient.
        optimizer: Bytes of the optimizer's state.
        update: Temporary bytes of an optimizer step, when there are no activations.
        held: For each level, the fastest first, the moments that may be the peak.
        embedding: Bytes of an embedding that is on the host where the layers are not on the device.
        head: Bytes of such a head, which is on the device while it is used.
        freed_for_head: Bytes of dequantized weights that are freed before it comes.
        passes: Passes of a micro-batch through the layers.
        products: Number of the base's weights that each token is multiplied by: of experts, those that it is sent to.
        layers_packed: Bytes of each layer's 4-bit weights, with their statistics.
        statistics_share: Share of the bytes of 4-bit weights that are their statistics.
        layers_dequantized: Bytes of each layer's 4-bit linear weights once they are dequantized.
        rows_attend: Whether attention spans whole sequences, even if they contain several documents.
        unpacked_why: Why documents can't be packed, as far as the architecture tells; None if it does not.
        vocabulary: Number of rows of the head, whose logits are computed in chunks; None for a head of scores.
        positions: Number of positions that the model supports; None if its config does not say.
    """

    weights: int
    adapters: int
    optimizer: int
    update: int
    held: dict[str, list[Moment]]
    embedding: int
    head: int
    freed_for_head: int
    passes: Passes
    products: int
    layers_packed: list[int]
    statistics_share: float
    layers_dequantized: list[int]
    rows_attend: bool
    unpacked_why: str | None
    vocabulary: int | None
    positions: int | None


def take_footprint(
    config: RunConfig,
    files: BaseFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    row: int,
    loss: Loss,
    levels: Sequence[str] | None = None,
) -> Footprint:
    """Run a training step on the meta device with one layer of each kind, and extrapolate to all layers.

    Args:
        config: Config of the run.
        files: Files of the base; only its config.json is needed.
        device: Device of the run; it need not be on this machine.
        dtype: Compute dtype.
        tokens: Number of tokens of a micro-batch.
        row: Number of tokens of the longest document.
        loss: Loss that is minimized.
        levels: Levels of recomputation to run; default: all. On CUDA all are run.

    Raises:
        ModelError: The base can't be trained, or its step can't be run on the meta device.
    """
    read_config(files, config.model.trust_remote_code)
    _check_task(files, loss)
    quantization = _quantization(config, files)
    model = build_skeleton(files, config.model.trust_remote_code, loss.head)
    head = output_head(model)
    if head is None:
        raise ModelError(
            f"{files.name}: {type(model).__name__} has no output head; set model.base to a model with one."
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.itemsize == 2:  # those in fp32, as rotary frequencies, stay so
            buffer.data = buffer.data.to(dtype)
    model.requires_grad_(False)
    settings = check_base(config.model, files, model, dtype)
    names = [] if settings is None else quantized_names(model, settings)
    quantized = {name: model.get_submodule(name) for name in names}
    specs = adapter_specs(model, config.lora)
    adapted = {name: model.get_submodule(name) for name in specs}
    experts = {} if quantization is None else expert_stacks(model)
    dtype_trained = adapter_spec(config.lora).dtype
    train_rows(model, config.lora.modules_to_save, _new_ids(config, files), dtype_trained)
    of_experts = expert_specs(model, config.lora)
    stacks = expert_stacks(model)
    values: list[Values] = [
        (specs[layer], name, shape)
        for layer, one in adapted.items()
        for name, shape in specs[layer].shapes(one.out_features, one.in_features).items()
    ]
    values += [
        (spec, name, shape)
        for stack, spec in of_experts.items()
        for name, shape in factor_shapes(spec, stacks[stack].shape, stacks[stack].is_transposed).items()
    ]
    in_4bit = _bytes_in_4bit(quantized, experts, bool(quantization), expert_type(files))
    codes = sum(each.weight.numel() for each in quantized.values()) // 2
    codes += sum(stack.numel for stack in experts.values()) // 2
    weights = _weight_bytes(model, in_4bit)
    weights += _fixed_bytes(config, loss, specs, adapted, values)
    trained = [
        nn.Parameter(torch.empty(shape, dtype=dtype_trained, device="meta"))
        for spec, name, shape in values
        if spec.trains(name)
    ]
    all_rows = {parameter for _, rows in trained_rows(model) for parameter in rows.trained}
    if loss.has_reference:
        weights += sum(each.nbytes for each in all_rows)
    flat = FlatParameters(("", each) for each in [*trained, *all_rows])
    optimizer = make_optimizer(config.train.optimizer, flat, rounding=config.train.rounding)

    stack = Stack(model, adapted, specs, quantized, experts, of_experts)
    head = output_head(model)
    head_name = next(name for name, module in model.named_modules() if module is head)
    on_host = {name: layer.weight.nbytes for name, layer in rows_for_host(model).items()}
    products = _products(model)
    packed = [sum(size for name, size in in_4bit.items() if name.startswith(each)) for each in stack.prefixes]
    by_layer = [sum(module.weight.numel() for name, module in quantized.items() if name.startswith(prefix))
                for prefix in stack.prefixes]  # fmt: skip
    try:
        unpacked_why = unpackable_reason(model, config.data.max_seq_len) if config.data.packs else None
        set_attention(model, config, device, row, packed=config.data.packs and unpacked_why is None)
        stack.reduce(config, device, tokens)
        held = trace_levels(stack, loss, levels)
        passes = count_passes(stack, loss)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{type(model).__name__} can't be run on the meta device, so its memory can't be estimated: {reason}"
        ) from error
    return Footprint(
        weights=weights,
        adapters=flat.data.nbytes + flat.grad.nbytes,
        optimizer=optimizer.state_bytes,
        update=optimizer.update_bytes,
        held=held,
        embedding=sum(each for name, each in on_host.items() if name != head_name),
        head=on_host.get(head_name, 0),
        freed_for_head=stack.scratch.nbytes if device.type == "cuda" else 0,
        passes=passes,
        products=products,
        layers_packed=packed,
        statistics_share=1 - codes / (sum(in_4bit.values()) or 1),
        layers_dequantized=[numel * dtype.itemsize for numel in by_layer],
        rows_attend=model.config._attn_implementation == "eager",
        unpacked_why=unpacked_why,
        vocabulary=None if loss.head else sum(map(len, head_blocks(output_head(model)))),
        positions=positions_of(files, model.config),
    )


def _check_task(files: BaseFiles, loss: Loss) -> None:
    """Check that a base is a causal language model; the weights of others lack its head."""
    if loss.head is not None and (stored_head(files.config) is not None or of_images(files.config)):
        return
    for name in files.config.get("architectures") or []:
        _, is_named, task = name.rpartition("For")
        if is_named and task not in CAUSAL_TASKS:
            raise ModelError(f"{files.name} is a {name}, not a causal language model; set model.base to one.")


def _new_ids(config: RunConfig, files: BaseFiles) -> range:
    """Return the ids of tokens that a config adds; without any, no tokenizer is needed."""
    if not config.data.new_tokens:
        return range(0)
    return add_new_tokens(load_tokenizer(files.folder, config.model.trust_remote_code), config.data.new_tokens)


def _quantization(config: RunConfig, files: BaseFiles) -> bool | None:
    """Return whether the 4-bit weights' statistics are quantized too; None if the weights are not in 4 bits."""
    if weight_format(files, config.model.quantization) == BITSANDBYTES_4BIT:
        return bool(files.config["quantization_config"].get("bnb_4bit_use_double_quant"))
    return config.model.double_quant if config.model.quantization == "nf4" else None


def nf4_bytes(numel: int, double_quant: bool, block_size: int = BLOCK_SIZE) -> int:
    """Return the bytes of a number of parameters in 4 bits, including their statistics."""
    blocks = -(-numel // block_size)
    statistics = blocks + FP32_BYTES * (-(-blocks // NESTED_BLOCK_SIZE) + 1) if double_quant else FP32_BYTES * blocks
    return -(-numel // 2) + statistics


def _products(model: nn.Module) -> int:
    """Return the number of weights of linear layers, experts and head that a token is multiplied by.

    Those are all experts where the config does not say how many a token is sent to.
    """
    stacks = expert_stacks(model)
    linears = sum(numel for name, numel, _ in linear_weights(model) if name not in stacks)
    head = sum(block.numel() for block in head_blocks(output_head(model)))
    try:
        chosen = experts_per_token(model) if stacks else 0
    except ModelError:
        chosen = max(stack.shape[0] for stack in stacks.values())
    return linears + head + sum(chosen * stack.numel // stack.shape[0] for stack in stacks.values())


def _bytes_in_4bit(
    quantized: Mapping[str, Any], experts: Mapping[str, ExpertStack], double_quant: bool, type_of_experts: str
) -> dict[str, int]:
    """Return the bytes of each linear layer and each stack of experts that is in 4 bits, by name."""
    # The scales of MXFP4 are in 8 bits in any case.
    settings = (True, MXFP4_BLOCK_SIZE) if type_of_experts == MXFP4 else (double_quant, BLOCK_SIZE)
    of_linears = {name: nf4_bytes(module.weight.numel(), double_quant) for name, module in quantized.items()}
    return of_linears | {  # each expert has statistics of its own
        name: stack.shape[0] * nf4_bytes(math.prod(stack.sizes), *settings) for name, stack in experts.items()
    }


def _fixed_bytes(
    config: RunConfig,
    loss: Loss,
    specs: Mapping[str, AdapterSpec],
    adapted: Mapping[str, Any],
    values: Iterable[Values],
) -> int:
    """Return the bytes of what adapters hold and don't train: frozen terms and factors, indices, and null spaces."""
    section, keep = config.lora, config.train.keep
    # The subtracted part of PiSSA, the initial values of `reconstruct`, which stay where the adapters are off, or an
    # adapter that is trained further and compared with.
    is_kept = loss.has_reference and section.start_from is not None and not section.stack
    has_copy = section.init in ("pissa", "reconstruct") or is_kept
    has_null_space = keep is not None and keep.null_space is not None
    total = sum(
        math.prod(shape) * spec.dtype.itemsize
        for spec, name, shape in values
        if name.startswith("lora_") and (has_copy or not spec.trains(name))
    )
    for layer, one in adapted.items():
        spec = specs[layer]
        if has_null_space:
            total += one.in_features * min(MOST_DIRECTIONS, one.in_features // 2) * FP32_BYTES
        total += {"rows": 8 * spec.rank, "dora": FP32_BYTES * one.out_features}.get(spec.kind, 0)
    if section.stack and section.start_from is not None:
        path = Path(section.start_from).expanduser()
        found = (folder / WEIGHTS_FILE for folder in (path / "adapter", path))
        total += next((file.stat().st_size for file in found if file.is_file()), 0)
    return total


def _weight_bytes(model: nn.Module, in_4bit: Mapping[str, int]) -> int:
    total = 0
    for name, parameter in model.named_parameters():  # each once, even if modules share it
        if not parameter.requires_grad:
            total += in_4bit.get(name, in_4bit.get(name.removesuffix(".weight"), parameter.nbytes))
    return total + sum(buffer.nbytes for buffer in model.buffers())
