"""Functions shared by the benchmarks: a random base, qlora's and PEFT's model on it, and the frame of a table."""

import json
import math
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "docs" / "benchmarks"
REALDATA = Path(os.environ.get("QLORA_REALDATA", "../shared/realdata"))
TOKENIZER = REALDATA / "tokenizers" / "tinyllama_chat_hf"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
    "limits": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}


def make_base(folder: Path, shape: str | dict[str, Any], tokenizer: Path | None = None, seed: int = 0) -> None:
    """Save a model with random weights in bf16 as a user would have it.

    Args:
        folder: Folder of the base; created if it does not exist.
        shape: One of `SHAPES`, sizes of a Llama, or the path of a config.json.
        tokenizer: Folder whose tokenizer is saved with it; one of two tokens if it does not exist.
        seed: Seed of the weights.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    sizes = SHAPES.get(shape, shape) if isinstance(shape, str) else shape
    if isinstance(sizes, str):
        path = Path(sizes)
        config = AutoConfig.from_pretrained(path if path.is_dir() else path.parent)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    else:
        config = LlamaConfig(**{"tie_word_embeddings": False, "max_position_embeddings": 1 << 17} | sizes)
    torch.manual_seed(seed)
    # On a GPU where there is one: drawing 8 billion numbers takes minutes on a CPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    if tokenizer and tokenizer.is_dir():
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    else:
        words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)


def shape_name(shape: str) -> str:
    """Return the name of a shape in a table: for a config.json, its folder."""
    path = Path(shape)
    return shape if shape in SHAPES else path.name if path.is_dir() else path.parent.name


def random_rows(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Return rows of token ids; small ids are far more frequent, so that the loss can fall from the first step."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, length, generator=generator, dtype=torch.float64).pow(4) * vocabulary
    return drawn.long().tolist()


def build_qlora(
    base: str, rank: int, alpha: float, recompute: str, seed: int = 0, holds: bool = False, kind: str = "lora"
) -> tuple[Any, Any]:
    """Return a base with qlora's adapters, in training mode, and its tokenizer; `holds` caches dequantized weights."""
    from qlora.layers import apply_recompute, cache_weights, rebuild_activations, use_document_attention
    from qlora.lora import add_lora, lora_layers
    from qlora.model import load_base

    model, tokenizer = load_base(base)
    add_lora(model, rank=rank, alpha=alpha, kind=kind)
    for name, layer in lora_layers(model):
        layer.lora_A.data.copy_(first_values(name, layer.lora_A.shape, seed))
    use_document_attention(model)
    rebuild_activations(model)
    apply_recompute(model, recompute)
    if holds:
        cache_weights(model, math.inf)
    return model.train(), tokenizer


def build_peft(base: str, rank: int, alpha: float, setting: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a base with PEFT's adapters on bitsandbytes' layers that transformers loaded, and its tokenizer.

    Args:
        base: Folder of the base.
        rank: Rank of the adapters.
        alpha: Alpha of the adapters.
        setting: Words joined by `+`: `none` or `full` for gradient checkpointing; `prepare` for PEFT's
            `prepare_model_for_kbit_training`; `bf16` for factors in bf16 instead of fp32. Others are for the caller.
        seed: Seed of the initial values of A.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    words = setting.split("+")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
    )
    for module in model.modules():
        # Otherwise its first evaluation repacks the weights in place, and no gradient is computed.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    if "prepare" in words:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapters = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    model = get_peft_model(model, adapters, autocast_adapter_dtype="bf16" not in words)
    set_peft_values(model, seed)
    if "full" in words:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), AutoTokenizer.from_pretrained(base)


def set_peft_values(model: Any, seed: int) -> None:
    """Set PEFT's factors to the initial values of qlora's."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            for key in module.lora_A:
                weight = module.lora_A[key].weight
                weight.data.copy_(first_values(name.removeprefix("base_model.model."), weight.shape, seed))
                module.lora_B[key].weight.data.zero_()


def first_values(name: str, shape: Any, seed: int) -> Any:
    """Return the initial values of a layer's A in bf16, seeded by its name and not by its place in the model."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    values = torch.empty(tuple(shape), dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values.to(torch.bfloat16)


def peft_loss(model: Any, batch: Any) -> Any:
    """Return the mean loss as transformers' trainer computes it: by the model, from all logits."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        shift_labels=batch.labels,
        num_items_in_batch=batch.num_supervised,
        use_cache=False,
    ).loss


def recompute_levels() -> list[str]:
    """Return the levels that a config may name and that a model supports on this machine's device."""
    from typing import get_args

    import torch

    from qlora.config import ModelSection

    named = get_args(ModelSection.model_fields["recompute"].annotation)
    lacking = ("auto",) if torch.cuda.is_available() else ("auto", "offload", "offload+tiled")
    return [level for level in named if level not in lacking]


def installed(*packages: str) -> bool:
    """Return whether all packages can be imported."""
    return all(find_spec(package) is not None for package in packages)


def heading(title: str, *packages: str) -> list[str]:
    """Return the head of a table: date, subject, hardware, load, versions and commit."""
    return [f"## {date.today()}: {title}", "", f"{hardware()}; {versions(*packages)}; {commit()}", ""]


def hardware() -> str:
    """Describe cores, processor, GPU if any, and the load of the machine."""
    import torch

    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {processor()}{gpu}; load {os.getloadavg()[0]:.1f}"


def processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions(*packages: str) -> str:
    """Return the versions of the packages that are installed."""
    return ", ".join(_versions(packages))


def _versions(packages: tuple[str, ...]) -> Iterator[str]:
    for package in packages:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def commit() -> str:
    """Return the commit of the checkout that qlora is imported from, and whether its code has changed since."""
    spec = find_spec("qlora")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    try:
        name = _git(package, "rev-parse", "--short", "HEAD")
        return f"commit {name}{' with changes' if _git(package, 'status', '--porcelain', '.') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_child(module: str, *arguments: str) -> Any:
    """Run a module in its own process; return the JSON of its last line."""
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


def append(path: Path, title: str, lines: list[str]) -> None:
    """Append lines to a page; a new page begins with its title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(title, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *lines, ""]))


class Section:
    """Lines that are printed, and written to a page as they are known, so that they outlast a process that is stopped.

    Args:
        path: Page that they are appended to; None only prints them.
        title: What a new page begins with.
    """

    def __init__(self, path: Path | None, title: str) -> None:
        self._path = path
        if path is not None:
            append(path, title, [])

    def write(self, *lines: str) -> None:
        """Print lines, and append them to the page."""
        print("\n".join(lines), flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)


def cell(text: str) -> str:
    """Return text for a cell of a table, in which a bar would begin the next one."""
    return text.replace("|", "\\|")
