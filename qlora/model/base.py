"""Loading a base: each linear layer is quantized to NF4 as it is read, and becomes an `NF4Linear`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from qlora.errors import ExportError, ModelError
from qlora.files import BaseFiles
from qlora.layers import use_document_rotary
from qlora.layers.experts import use_nf4_experts
from qlora.layers.placement import place_weights
from qlora.lora import ScoreHead, TextPart, text_part
from qlora.model.base_weights import BaseWeights
from qlora.model.device import resolve_compute_dtype, resolve_device
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.host_memory import keep_freed_memory, returned_to_system
from qlora.model.kinds import is_multimodal
from qlora.model.on_weight import OnWeight, replace_when_read
from qlora.model.placing import make_placement, place_complete_layers, take_over_linears
from qlora.model.processor import load_processor
from qlora.model.quantization import LoadingAborted, find_quantized_layers, settings_of_base
from qlora.model.score import replace_head
from qlora.model.shares import check_share
from qlora.model.skeleton import build_skeleton
from qlora.model.text_only import find_text_model, tensors_of_text
from qlora.model.tokenizer import GENERATION_FILE, load_generation_config
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes

QUANTIZATIONS = ("nf4", "none")


def load_base(
    base: str,
    quantization: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "auto",
    device: str | torch.device = "auto",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_weight: OnWeight | None = None,
    head: ScoreHead | None = None,
    seed: int = 0,
    rope_scaling: Mapping[str, Any] | None = None,
    keep_16bit: Sequence[str] = (),
    allow_unquantized: bool = False,
    whole: bool = False,
    weights: str = "device",
    processes: Processes | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model, or one that scores documents, frozen, and its tokenizer or image processor.

    Every linear layer except the output head becomes an `NF4Linear`, one at a time as its file is read. Everything
    else is loaded in the compute dtype, including subclasses of `nn.Linear` that compute something else. Of a
    multimodal model, only the text part is built and read.

    Args:
        base: A folder, a GGUF file, or a model id on the hub. A checkpoint in bitsandbytes 4-bit keeps its codes;
            weights in FP8, MXFP4 and GGUF are decoded as they are read.
        quantization: `nf4` or `none`.
        double_quant: Quantize the blocks' statistics too.
        compute_dtype: `bfloat16` (or `bf16`), `float16`, `float32`, or `auto`: see :func:`resolve_compute_dtype`.
        device: `cuda`, `cpu`, …; `auto` takes a GPU if there is one.
        attention: An attention implementation of transformers, or `auto` for its choice.
        revision: Revision of a model on the hub.
        trust_remote_code: Run code that comes with the model.
        on_weight: Called once for each layer that is quantized, with the name of its module and its weight as
            stored: (out_features, in_features), on the CPU, in the file's dtype. It returns the weight to quantize
            instead: the same shape, in 16 or 32 bits, on any device. This is cast to the compute dtype and
            quantized before the next weight is read.
        head: Head that scores documents, in place of the one over the vocabulary. The base's own is taken if its files
            have one for the same scores; otherwise its values are drawn from the seed.
        seed: Seed of these values.
        rope_scaling: Extends the context: `type` (`yarn`, `linear` or `dynamic`) and `factor`.
        keep_16bit: Linear layers that are not quantized, by names or patterns as in :class:`qlora.lora.Targets`.
        allow_unquantized: Load a base even if less than half of its linear and expert weights end up in 4 bits.
        whole: Whether to load the other parts of a multimodal model too, such as its vision tower.
        weights: Where the 4-bit weights of the layers are: on the `device`, `sharded` over the processes, or on the
            `host`; see :mod:`qlora.layers.host_weights` and :mod:`qlora.layers.sharding`.
        processes: Processes that all load the base, which `sharded` weights are split over.

    Returns:
        The model, in evaluation mode, and its tokenizer; of a model of images its image processor.

    Raises:
        ModelError: An argument is unknown, the base can't be found, read or loaded, its files lack weights that the
            model needs, most of them would stay in 16 bits, or `on_weight` failed or has no quantized weight to
            replace.
    """
    model = load_frozen(
        base, quantization, double_quant, compute_dtype, device, attention, revision, trust_remote_code, on_weight,
        head, seed, rope_scaling, keep_16bit, allow_unquantized, whole, weights, processes,
    )  # fmt: skip
    files = BaseFiles.resolve(base, revision, trust_remote_code, with_weights=False)
    return model, load_processor(files.folder, trust_remote_code)


def load_frozen(
    base: str,
    quantization: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "auto",
    device: str | torch.device = "auto",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_weight: OnWeight | None = None,
    head: ScoreHead | None = None,
    seed: int = 0,
    rope_scaling: Mapping[str, Any] | None = None,
    keep_16bit: Sequence[str] = (),
    allow_unquantized: bool = False,
    whole: bool = False,
    weights: str = "device",
    processes: Processes | None = None,
) -> Any:
    """Load a model as :func:`load_base` does, without its tokenizer; the arguments and errors are the same."""
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization: {quantization!r} should be one of {', '.join(QUANTIZATIONS)}.")
    files = BaseFiles.resolve(base, revision, trust_remote_code, rope_scaling=rope_scaling)
    stored_in = weight_format(files, quantization)
    device = resolve_device(device)
    placed = make_placement(weights, quantization, device, processes)
    dtype = resolve_compute_dtype(compute_dtype, device)
    if on_weight is not None and (quantization == "none" or stored_in == BITSANDBYTES_4BIT):
        remedy = "set quantization: nf4" if quantization == "none" else "use the 16-bit model that it was made from"
        raise ModelError(
            f"on_weight replaces weights before they are quantized, but no weight of {base} is quantized; {remedy}."
        )
    # Weights that are quantized while they are read are placed layer by layer; others afterwards.
    leaves_early = placed is not None and stored_in != BITSANDBYTES_4BIT
    # To the host a layer comes from the device. Split layers come from the CPU, so that embedding and head, which go to
    # the device until adapters are added, do so when no whole layer is there.
    is_on_device = placed is None or (placed.kind == "host" and leaves_early)
    first_device = device if is_on_device else torch.device("cpu")
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(first_device)}}
    if attention != "auto":
        arguments["attn_implementation"] = attention
    skeleton = build_skeleton(files, trust_remote_code, head, whole)
    settings = settings_of_base(files, skeleton, quantization, double_quant, dtype, keep_16bit)
    if settings is not None and not allow_unquantized:
        check_share(base, skeleton, settings)
    if settings is not None and stored_in != BITSANDBYTES_4BIT:
        arguments["quantization_config"] = settings
        if placed is not None:
            # A function of its own, because transformers copies settings with all they refer to.
            settings.after_weight = lambda model, experts: place_complete_layers(placed, model, experts)
    if stored_in != BITSANDBYTES_4BIT:
        for config in (skeleton.config, skeleton.config.get_text_config()):
            vars(config).pop("quantization_config", None)  # it describes the stored weights, which are read decoded
    stored = BaseWeights(files)
    of_text = None if text_part(skeleton) is None else tensors_of_text(skeleton, stored.shapes)
    tensors: dict[str, Any] = {**stored.lazy(of_text)}
    drawn: set[str] = set()
    if head is not None:
        tensors, drawn = replace_head(files, skeleton, head, tensors, seed, trust_remote_code)
    _check_shapes(stored, base, skeleton, drawn)
    if on_weight is not None:
        layers = find_quantized_layers(skeleton, settings, base, tensors)
        tensors = replace_when_read(tensors, layers, on_weight)
    with processes.raise_together() if processes and weights == "sharded" else nullcontext():
        try:
            with returned_to_system(), bars_on_terminals():
                model, info = type(skeleton).from_pretrained(
                    None, config=skeleton.config, state_dict=tensors, output_loading_info=True, **arguments
                )
                experts = getattr(getattr(model, "hf_quantizer", None), "experts", {})
                _take_over_linears(model)
                use_document_rotary(model)
                if quantization == "nf4":
                    use_nf4_experts(model, experts, double_quant)
                if placed is not None:
                    place_weights(model, placed)
            _check_complete(base, info["missing_keys"])
            _check_finite(base, model)
        except LoadingAborted as error:
            raise _loading_failed(base, error) from error
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, ExportError) as error:
            if attention != "auto" and "attention" in str(error).lower():
                raise ModelError(
                    f"attention: {attention!r} (model.attention) is not available for {base}: {error} Set it to auto."
                ) from error
            raise _loading_failed(base, error) from error
    if whole and is_multimodal(model.config):
        model.text_part = TextPart(find_text_model(model)[0], {})
    if (files.folder / GENERATION_FILE).is_file():
        model.generation_config = load_generation_config(files.folder)
    if model.device.type == "cpu":
        keep_freed_memory()
    return model.requires_grad_(False).eval()


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Show transformers' progress bars on a terminal only: in logs and notebooks each update would be a line."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _check_shapes(weights: BaseWeights, base: str, skeleton: Any, drawn: set[str]) -> None:
    """Check that the files hold what config.json describes; transformers checks less, and does not name the weights.

    Args:
        weights: The files' weights.
        base: Name of the base.
        skeleton: Model without weights.
        drawn: Names of weights that are not loaded from the files.

    Raises:
        ModelError: config.json describes far more parameters than there are, or other shapes.
    """
    problems = []
    described, stored = sum(value.numel() for value in skeleton.parameters()), weights.num_parameters
    if (
        described > 2 * stored
    ):  # a tied head may count twice; missing weights would be allocated before they are reported
        problems.append(f"config.json describes {described:,} parameters, but the files hold {stored:,}")
    for name, parameter in skeleton.state_dict().items():
        shape = weights.shapes.get(name)
        if shape is not None and name not in drawn and not weights.is_4bit(name) and shape != tuple(parameter.shape):
            problems.append(f"{name} is {shape}, but config.json describes {tuple(parameter.shape)}")
    if problems:
        raise ModelError(f"{base}: weights and config do not match: {_first(problems)}; download the base again.")


def _check_complete(base: str, missing: set[str]) -> None:
    """Check that every parameter came from the files; transformers fills missing ones with random values.

    Raises:
        ModelError: Some did not.
    """
    if missing:
        raise ModelError(f"{base} lacks weights of the model: {_first(sorted(missing))}.")


def _check_finite(base: str, model: Any) -> None:
    """Check that no value overflowed in the cast to the compute dtype, as large ones do in fp16.

    Raises:
        ModelError: Some did.
    """
    # Smallest and largest values, because `isfinite` would take as much memory again as the parameter.
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all()
    ]
    if broken:
        raise ModelError(f"{base}: values are not finite in {model.dtype}: {_first(broken)}; set model.compute_dtype.")


def _loading_failed(base: str, error: BaseException) -> ModelError:
    """Return what an error that ended the loading is for the user, with a remedy if memory ran out."""
    cause = error.__cause__ if isinstance(error, LoadingAborted) else error
    remedy = ". Stop other programs that take memory, set another model.weights, or use a smaller base."
    has_run_out = cause is not None and is_out_of_memory(cause)
    return ModelError(f"{base} can't be loaded: {str(error).rstrip('.') + remedy if has_run_out else error}")


def _first(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _take_over_linears(model: Any) -> None:
    """Replace bitsandbytes' own layers by `NF4Linear`, and remove transformers' quantizer from the model."""
    take_over_linears(model)
    if getattr(model, "is_quantized", False):
        # Transformers saves, moves and casts by these attributes, which no longer describe the layers.
        model.is_quantized = model.is_loaded_in_4bit = False
        model.hf_quantizer = None
        del model.config.quantization_config
