"""Loading a base: each linear quantized to NF4 as it lands, and held in our own layer."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora.dtypes import as_dtype
from qlora.errors import ModelError
from qlora.files import BaseFiles
from qlora.model.host_memory import returned_to_system
from qlora.nf4 import NF4Linear, is_bitsandbytes_linear

GENERATION_FILE = "generation_config.json"
QUANTIZATIONS = ("nf4", "none")
# Keys of a config that count modules, which may be this many; those that may name a kernel to be had from the hub; and
# the ids that a tokenizer may have.
COUNT_KEYS = re.compile(r"(^|_)(layers?|experts?|blocks|depth)$")
MAX_COUNT = 10_000
KERNEL_KEYS = ("attn_implementation", "experts_implementation")
MAX_VOCABULARY = 1 << 24
TEMPLATE_NAME = re.compile(r"\w[\w.-]*")


def load_base(
    base: str,
    quantization: str = "nf4",
    double_quant: bool = True,
    compute_dtype: str = "auto",
    device: str | torch.device = "auto",
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Loads a causal language model, frozen, and its tokenizer.

    Every linear layer but the output head becomes an `NF4Linear`, one at a time as its file is read. All else
    is held in the compute dtype: the checkpoint's own width where both have 16 bits, never wider than asked.

    Args:
        base: A folder, or a model id on the hub. Checkpoints in bitsandbytes-4-bit are taken as they are.
        quantization: `nf4` or `none`.
        double_quant: Quantize the blocks' statistics too.
        compute_dtype: `bfloat16` (or `bf16`), `float16`, `float32`, or `auto`: see :func:`resolve_compute_dtype`.
        device: `cuda`, `cpu`, …; `auto` takes a GPU if there is one.
        attention: An attention implementation of transformers, or `auto` for its choice.
        revision: Of a model on the hub.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ModelError: An argument is unknown, the base can't be found or loaded, or its files lack weights that the
            model needs.
    """
    from transformers import BitsAndBytesConfig

    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization: {quantization!r} should be one of {', '.join(QUANTIZATIONS)}.")
    files = BaseFiles.resolve(base, revision, trust_remote_code)
    device = resolve_device(device)
    dtype = resolve_compute_dtype(compute_dtype, device)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(device)}}
    if attention != "auto":
        arguments["attn_implementation"] = attention
    if quantization == "nf4" and not files.is_bitsandbytes_4bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantization == "none" and files.is_bitsandbytes_4bit:
        raise ModelError(f"model.quantization: none, but {base} is quantized to 4 bits already; leave it at nf4.")
    skeleton = build_skeleton(files, trust_remote_code)
    _check_shapes(files, skeleton)
    try:
        with returned_to_system():
            model, info = type(skeleton).from_pretrained(
                None, config=skeleton.config, state_dict=files.open_tensors(), output_loading_info=True, **arguments
            )
            _take_over_linears(model)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(f"{base} can't be loaded: {error}") from error
    _check_complete(base, info["missing_keys"])
    _check_finite(base, model)
    if (files.folder / GENERATION_FILE).is_file():
        model.generation_config = load_generation_config(files.folder)
    return model.requires_grad_(False).eval(), load_tokenizer(files.folder, trust_remote_code)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Loads a base's tokenizer alone.

    Args:
        folder: Where it is.
        trust_remote_code: Run code that comes with it.

    Raises:
        ModelError: The base has none, it needs code that may not be run, or it would be no use.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever is wrong with one of its files
        raise ModelError(f"{folder}: the tokenizer can't be loaded: {_told(error, trust_remote_code)}") from error
    _check_tokenizer(folder, tokenizer)
    return tokenizer


def load_generation_config(folder: Path) -> Any:
    """Loads how a model generates by default; transformers' own defaults where its folder does not say.

    Raises:
        ModelError: The file is damaged, or its end tokens are no ids.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION_FILE).is_file():
        return GenerationConfig()
    try:
        config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever its values make transformers do
        raise ModelError(f"{folder / GENERATION_FILE} can't be read: {error}; download it again.") from error
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(end is None or type(end) is int for end in ends):
        raise ModelError(f"{folder / GENERATION_FILE}: eos_token_id {config.eos_token_id!r:.80} is no id.")
    return config


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device asked for, or the GPU if there is one.

    Raises:
        ModelError: It is not here, or is none that computes.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        return found
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"Device '{device}' can't be used here: {str(error).splitlines()[0]}") from None


def resolve_compute_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of activations and of all that is not quantized.

    `auto` is bf16 where the hardware multiplies it, else fp16 on GPUs (the loss is then scaled) and fp32 on CPUs.

    Raises:
        ModelError: There is no such dtype.
    """
    if compute_dtype != "auto":
        return as_dtype(compute_dtype, ModelError)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def build_skeleton(files: BaseFiles, trust_remote_code: bool = False) -> Any:
    """Builds a base's architecture without weights, on the meta device.

    Raises:
        ModelError: transformers does not know it, it needs code that may not be run, or its sizes can't be.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_config(files)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever its values make an architecture do
        reason = _told(error, trust_remote_code)
        raise ModelError(f"{files.name}: the architecture can't be built: {reason}") from error


def _check_config(files: BaseFiles) -> None:
    """Sees that a config asks neither for code from the hub nor for more modules than any model has.

    Each module takes memory by itself, even on the meta device, where weights take none.
    """
    for key, value in _walk(files.config):
        if key.endswith(KERNEL_KEYS) and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"{files.name}: config.json asks for code from the hub, {key}: {value!r:.80}; take it out."
            )
        if COUNT_KEYS.search(key) and isinstance(value, int | float) and value > MAX_COUNT:
            raise ModelError(f"{files.name}: config.json asks for {key}: {value}, and no model has over {MAX_COUNT}.")


def _walk(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of the sections within too."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, dict):
            yield from _walk(value)


def _check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Sees that its ids can be those of a model, and that its templates have names that they can be saved by."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MAX_VOCABULARY:
        raise ModelError(f"{folder}: the tokenizer has the id {largest}, and no model has {MAX_VOCABULARY} tokens.")
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not TEMPLATE_NAME.fullmatch(name):
            raise ModelError(f"{folder}: the tokenizer has a chat template named {name!r:.80}, which is no file name.")


def _told(error: Exception, trust_remote_code: bool) -> str:
    """What transformers said, and the setting by its name here where it wants to run code."""
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return (
            "it comes with code of its own, which runs with all your rights; read it, and set model.trust_remote_code: "
            "true (--trust-remote-code) if you trust it"
        )
    return str(error) or type(error).__name__


def _check_shapes(files: BaseFiles, skeleton: Any) -> None:
    """Sees that the files hold what their config describes; not every transformers does, and none names them."""
    problems = []
    described, held = sum(value.numel() for value in skeleton.parameters()), files.most_parameters
    if described > 2 * held:  # a tied head may be there twice; what no file has would take memory before it is missed
        problems.append(f"config.json asks for {described:,} parameters, and there are {held:,}")
    for name, parameter in skeleton.state_dict().items():
        shape = files.shape(name)
        if shape is not None and shape != tuple(parameter.shape):
            problems.append(f"{name} is {shape} where config.json asks for {tuple(parameter.shape)}")
    if problems:
        raise ModelError(f"{files.name}: weights and config do not belong together: {_first(problems)}.")


def _check_complete(base: str, missing: set[str]) -> None:
    """Sees that every parameter came from the files: transformers fills in random values with a warning."""
    if missing:
        raise ModelError(f"{base} lacks weights of the model: {_first(sorted(missing))}.")


def _check_finite(base: str, model: Any) -> None:
    """Sees that no value was lost in the cast to the compute dtype, as large ones are in fp16."""
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not parameter.isfinite().all()
    ]
    if broken:
        raise ModelError(f"{base}: values are not finite in {model.dtype}: {_first(broken)}; set model.compute_dtype.")


def _first(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _take_over_linears(model: Any) -> None:
    """Puts `NF4Linear` in the place of bitsandbytes' own layers, and forgets that a quantizer was here."""
    for name, module in list(model.named_modules()):
        if is_bitsandbytes_linear(module):
            model.set_submodule(name, NF4Linear.from_linear(module))
    if getattr(model, "is_quantized", False):
        # What transformers would save, move or cast by these no longer describes the layers.
        model.is_quantized = model.is_loaded_in_4bit = False
        model.hf_quantizer = None
        del model.config.quantization_config
