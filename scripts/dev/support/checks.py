"""What is checked of one architecture: a tiny random base is trained, merged, verified and read by PEFT, in fp32."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qlora
from qlora.checkpoint import RunDirectory
from qlora.data import collate, make_example
from qlora.errors import QLoRAError
from qlora.files import BaseFiles
from qlora.lora import lora_layers
from qlora.model import build_skeleton, keep_apart, supervised_loss, take_inventory
from qlora.proof.clients import check_clients
from scripts.dev.support.sizes import tiny_config

# Largest differences of logits of two models that compute the same in another order, and of losses, as a share.
LOGITS, LOSSES = 1e-4, 1e-5
# Smallest share of the weights of linear layers that a run may have in 4 bits without a word.
LEAST_IN_4_BITS = 0.5
TOKENS = 24
ROWS = [{"instruction": f"Add {one} and {one + 3}.", "output": f"{2 * one + 3}"} for one in range(24)]
RUN: dict[str, dict[str, Any]] = {
    "model": {"compute_dtype": "float32", "recompute": "none"},
    "lora": {"rank": 4, "alpha": 8, "dtype": "float32"},
    "data": {"max_seq_len": 192},
    "train": {
        "max_steps": 2, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
        "lr_scheduler": "constant", "warmup_steps": 0, "eval_every": None, "save_every": None,
    },
}  # fmt: skip
# The one reason for which PEFT may not load a run's adapter: what it does by its own rules, whoever wrote the adapter.
RENAMED_BY_PEFT = re.compile(
    r"does not load it: it renames (\S+) to (?!\1 )\S+, as a tensor of the published files, and drops it silently"
)
REFUSED, FAILED, NOT_RUN = "refused", "failed", "not run"


class _Stop(Exception):  # noqa: N818
    """The end of the checks, with what the row then says."""


def check(config_class: Any, auto_class: Any, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Run every check of one architecture; return its findings by name.

    Args:
        config_class: Config class of transformers.
        auto_class: Class of transformers that builds and loads its model.
        tokenizer: Folder of the tokenizer.
        folder: An empty folder to work in.

    Returns:
        The shares, the differences and the verdicts; `refused`, `failed` or `not run` with a sentence where the checks
        ended early, and `wrong` with every finding that should be another.
    """
    found: dict[str, Any] = {}
    base = folder / "base"
    ids = torch.randint(8, 200, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        with _stage(NOT_RUN):
            found["class"] = _make_base(config_class, auto_class, tokenizer, base)
            plain = auto_class.from_pretrained(base, dtype=torch.float32).eval()
            found["causal"] = _is_causal(plain, ids)
            del plain
        with _stage(FAILED):
            run = _train(base, folder, found)
            own = _logits(qlora.load_run(run)[0], ids)
        with _stage(FAILED):
            _check_adapters(base, ids, found)
        with _stage(FAILED):
            _check_release(run, folder, auto_class, ids, own, found)
        with _stage(FAILED):
            _check_peft(base, run, auto_class, ids, own, found)
    except _Stop as end:
        kind, sentence = end.args
        found[kind] = sentence
    found["wrong"] = [*_wrong(found)]
    return found


class _stage:  # noqa: N801
    """Ends the checks at an error: a sentence of qlora's is a refusal, and any other error what is given."""

    def __init__(self, otherwise: str) -> None:
        self.otherwise = otherwise

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, QLoRAError):
            raise _Stop(REFUSED, str(error)) from error
        if isinstance(error, Exception) and not isinstance(error, _Stop):
            raise _Stop(self.otherwise, f"{type(error).__name__}: {error}") from error


def _make_base(config_class: Any, auto_class: Any, tokenizer: Path, base: Path) -> str:
    """Save a random model in fp32 with the tokenizer; return the name of its class."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    special = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = auto_class.from_config(tiny_config(config_class, len(words), special)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that a lost one shows
            if name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(base)
    shutil.copytree(tokenizer, base, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    return type(model).__name__


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits of token ids, (1, tokens, vocabulary)."""
    return model.eval()(input_ids=ids, use_cache=False).logits


def _is_causal(model: Any, ids: torch.Tensor) -> bool:
    """Return whether no logits depend on later tokens."""
    other = ids.clone()
    other[:, -4:] += 1
    first, second = (_logits(model, each)[:, :-4] for each in (ids, other))
    return _difference(first, second) < LOGITS


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-6)).item()


def _check_adapters(base: Path, ids: torch.Tensor, found: dict[str, Any]) -> None:
    """Compare the base in NF4 with transformers', count its weights, and add adapters, which change nothing."""
    model, _ = qlora.load_base(str(base), compute_dtype="float32")
    before = _logits(model, ids)
    qlora.add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    found["step 0"] = (_logits(model, ids) - before).abs().max().item()
    inventory = take_inventory(model)
    found["in 4 bits"], found["adapted"] = inventory.quantized_share, inventory.adapted_share
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.02, generator=generator)
    documents = [
        make_example(torch.randint(8, 200, (length,), generator=generator).numpy(), [True] * length)
        for length in (17, 9, 20)
    ]
    apart = keep_apart(model, *documents[:2], any_attention=True, packed=True)
    if apart.mixed_reason is not None:
        found["packed"] = apart.mixed_reason
        return
    with torch.no_grad():
        together = supervised_loss(model.eval(), collate(documents, packed=True)).item()
        one_by_one = sum(supervised_loss(model, collate([document])).item() for document in documents)
    found["packed"] = abs(together - one_by_one) / abs(one_by_one)


def _train(base: Path, folder: Path, found: dict[str, Any]) -> Path:
    """Train for two steps, packed where qlora packs; return the run's folder."""
    run = folder / "run"
    places: dict[str, dict[str, Any]] = {
        "model": {"base": str(base)},
        "data": {"cache_dir": str(folder / "cache")},
        "train": {"output_dir": str(run)},
    }
    qlora.train({name: values | places.get(name, {}) for name, values in RUN.items()}, rows=ROWS)
    packed = RunDirectory.open(run).read_record().in_use.packing_fill is not None
    found["rows"] = "packed" if packed else "one each"
    return run


def _check_release(
    run: Path, folder: Path, auto_class: Any, ids: torch.Tensor, own: torch.Tensor, found: dict[str, Any]
) -> None:
    """Merge in fp32, load the folder with transformers alone, and verify it."""
    merged = folder / "merged"
    qlora.merge(run, merged, "float32", "dequantized")
    model, info = auto_class.from_pretrained(merged, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    found["merged"] = f"lacks {missing[0]}" if missing else _difference(_logits(model, ids), own)
    del model
    report = qlora.verify(run, merged, "cpu")
    found["verify"] = "matches" if report.matches else report.problems[0]


def _check_peft(
    base: Path, run: Path, auto_class: Any, ids: torch.Tensor, own: torch.Tensor, found: dict[str, Any]
) -> None:
    """Compare the base and the run with transformers and PEFT, on weights that bitsandbytes quantized.

    Where `qlora verify` says that PEFT does not load the adapter, its reason is what is found.
    """
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    ours, _ = qlora.load_base(str(base), compute_dtype="float32")
    model = auto_class.from_pretrained(base, dtype=torch.float32).eval()
    experts = dict(model.named_parameters())
    for name in take_inventory(ours).quantized:
        if name in experts:  # a stack of weights, each with statistics of its own
            experts[name].data = torch.stack([_rounded_to_nf4(weight) for weight in experts[name].data])
            continue
        layer: Any = model.get_submodule(name)
        if isinstance(layer, Conv1D):
            layer.weight.data = _rounded_to_nf4(layer.weight.data.T.contiguous()).T.contiguous()
        else:
            layer.weight.data = _rounded_to_nf4(layer.weight.data)
    found["base"] = _difference(_logits(ours, ids), _logits(model, ids))
    del ours
    verdict = check_clients(run / "adapter", build_skeleton(BaseFiles.resolve(str(base))))["peft"]
    if not verdict.loads:
        found["PEFT"] = str(verdict)
        return
    found["PEFT"] = _difference(_logits(PeftModel.from_pretrained(model, run / "adapter"), ids), own)


def _rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantize a weight with bitsandbytes, and dequantize it again.

    It is passed as one row, because some widths are dequantized wrongly on processors with AVX-512.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.reshape(1, -1), compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(codes, state).reshape(weight.shape)


BOUNDS: dict[str, Callable[[Any], bool]] = {
    "step 0": lambda value: value == 0,
    "packed": lambda value: isinstance(value, str) or value <= LOSSES,
    "merged": lambda value: isinstance(value, float) and value <= LOGITS,
    "verify": lambda value: value == "matches",
    "base": lambda value: value <= LOGITS,
    "PEFT": lambda value: RENAMED_BY_PEFT.fullmatch(value) is not None if isinstance(value, str) else value <= LOGITS,
    "failed": lambda value: False,
}


def _wrong(found: dict[str, Any]) -> Iterator[str]:
    """Yield the names of what was found and should be another."""
    yield from (name for name, is_right in BOUNDS.items() if name in found and not is_right(found[name]))
    if "rows" in found:  # it was trained
        if REFUSED in found:
            yield f"{REFUSED} after training"
        if not found["causal"]:
            yield "trained, but not causal"
        if found.get("in 4 bits", 1) < LEAST_IN_4_BITS:
            yield "trained, but mostly in 16 bits"
