"""Verify a release in llama.cpp: its logits against those of transformers, for each way to load it.

For a small pretrained model and a random one of each family, a run of a few steps is merged onto the original base, and
read by llama.cpp (1) from qlora's GGUF, (2) from the GGUF that llama.cpp's converter makes of the merged folder, (3) as
the base's GGUF with the GGUF of the adapter, by its converter and by qlora. In fp16 llama.cpp rounds what goes into
each product and its cache of keys and values to fp16; in fp32 it does not, which tells rounding from error. Needs
llama-cpp-python, sentencepiece, gguf, and a checkout of llama.cpp:

    python -m scripts.dev.bench.proof_llama_cpp --llama-cpp ../llama.cpp --out docs/benchmarks/release.md
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.dev.bench.common import REALDATA, append, heading
from scripts.dev.bench.proof_families import FAMILIES, OTHER_TOKENIZER, TOKENIZERS, make_base, train_run

PRETRAINED = "stories260K"
NAMES = (PRETRAINED, "llama", "qwen3", "mistral, odd sizes", "gemma", "gemma2", "gemma3")
OURS = ("llama", "qwen", "mistral", PRETRAINED)  # families that qlora writes GGUF of
DTYPES = {"float16": "f16", "float32": "f32"}
NUM_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Way:
    """A way to load a run in llama.cpp.

    Attributes:
        name: Name of the way.
        dtype: Dtype of the weights in the file.
        model: The GGUF file.
        adapter: GGUF file of an adapter on it; None if merged.
    """

    name: str
    dtype: str
    model: Path
    adapter: Path | None = None


def convert(llama_cpp: Path, program: str, source: Path, target: Path, dtype: str, *options: str) -> Path:
    """Run one of llama.cpp's converters."""
    command = [sys.executable, str(llama_cpp / program), str(source), "--outfile", str(target), "--outtype", dtype]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed on {source}:\n{done.stderr[-2000:]}")
    return target


def make_ways(name: str, base: Path, run: Path, folder: Path, llama_cpp: Path) -> Iterator[Way]:
    """Write a run's files for llama.cpp."""
    from qlora import merge

    for dtype, kind in DTYPES.items():
        merge(run, folder / kind, dtype, "original")
    if name.startswith(OURS):
        merge(run, folder / "ours", "float16", "original", format="gguf")
        yield Way("qlora's GGUF", "f16", folder / "ours" / "ours-f16.gguf")
    for kind in DTYPES.values():
        file = convert(llama_cpp, "convert_hf_to_gguf.py", folder / kind, folder / f"merged-{kind}.gguf", kind)
        yield Way("converted from the merged folder", kind, file)
    if name.startswith(OURS):
        merge(run, folder / "adapter", format="lora-gguf")
    for kind in DTYPES.values():
        file = convert(llama_cpp, "convert_hf_to_gguf.py", base, folder / f"base-{kind}.gguf", kind)
        if name.startswith(OURS):
            yield Way("base converted, adapter by qlora", kind, file, folder / "adapter" / "adapter-lora.gguf")
        adapter = convert(
            llama_cpp, "convert_lora_to_gguf.py", run / "adapter", folder / "adapter.gguf", "f32", "--base", str(base)
        )
        yield Way("base and adapter, converted", kind, file, adapter)


def logits_in_llama_cpp(way: Way, ids: list[int]) -> torch.Tensor:
    """Return the logits after each token, (tokens, vocabulary)."""
    import llama_cpp
    import numpy

    cache: dict[str, Any] = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(
        str(way.model),
        lora_path=way.adapter and str(way.adapter),
        n_ctx=256,
        n_threads=1,
        logits_all=True,
        verbose=False,
        **(cache if way.dtype == "f32" else {}),
    )
    model.eval(ids)
    logits = torch.from_numpy(numpy.array(model.scores[: len(ids)]))
    model.close()
    return logits


def compare(expected: torch.Tensor, found: torch.Tensor) -> str:
    """Return the cells of a table: differences of two models' logits."""
    difference = (expected - found).abs().amax(-1)
    differs = expected.argmax(-1) != found.argmax(-1)
    best = expected.topk(2).values
    gaps = (best[:, 0] - best[:, 1])[differs]
    # Of two logits as close as this each may be the larger one when both move by the difference.
    explained = "" if not len(gaps) else f", whose two best differ by up to {gaps.max():.1e}"
    size = expected.std().item()
    return f"{difference.max():.1e} | {size:.2g} | {int((~differs).sum())} of {len(differs)}{explained}"


@torch.no_grad()
def logits_in_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return the same logits by transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(torch.tensor([ids])).logits[0]


def prove(name: str, folder: Path, llama_cpp: Path) -> Iterator[str]:
    """Return the rows of one model."""
    from transformers import AutoTokenizer

    if name == PRETRAINED:
        base = REALDATA / "models" / "stories260K-hf"
        settings: dict[str, Any] = {"format": "text", "overlong": "split"}
        data = REALDATA / "tokenizers" / "cs336_tinystories" / "tinystories_sample.txt"
    else:
        base, settings = folder / "base", {}
        config_class, sizes = FAMILIES[name]
        tokenizer = REALDATA / "tokenizers" / TOKENIZERS.get(config_class, OTHER_TOKENIZER)
        make_base(base, config_class, sizes, tokenizer, seed=0)
        data = REALDATA / "data" / "llama_factory_demo" / "alpaca_en_demo.json"
    run = train_run(base, data, folder / "run", data=settings)
    text = (REALDATA / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:4000]
    ids = AutoTokenizer.from_pretrained(base)(text).input_ids[:NUM_TOKENS]
    for way in make_ways(name, base, run, folder, llama_cpp):
        # What the file holds: merged weights rounded to its dtype, or an adapter that is added in fp32.
        expected = logits_in_transformers(folder / ("f32" if way.adapter else way.dtype), ids)
        yield f"| {name} | {way.name} | {way.dtype} | {compare(expected, logits_in_llama_cpp(way, ids))} |"


def main() -> None:
    """Verify each model, print the table and append it to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="checkout of llama.cpp, for its converters")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, help="page to append to")
    arguments = parser.parse_args()
    lines = heading("logits in llama.cpp", "torch", "transformers", "llama-cpp-python", "gguf") + [
        "| model | way | weights | logits off by at most | their deviation | same likeliest token |",
        "|---|---|---|---|---|---|",
    ]
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            for line in prove(name, Path(folder), arguments.llama_cpp):
                lines.append(line)
                print(line, flush=True)
    if arguments.out:
        append(arguments.out, "# Release\n", lines)


if __name__ == "__main__":
    main()
