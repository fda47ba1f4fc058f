"""Measure a merge's memory and speed, compared with a plain copy of the base's files with a cast.

Makes a random Llama checkpoint and an adapter for it in a temporary folder; copies and casts its files, file by file
with safetensors' own functions and as a stream of blocks, and merges the adapter onto both kinds of base weights, each
in a process of its own, in the order A B B A; appends a table to docs/benchmarks/merging.md. Peaks are resident memory
above what was resident after the imports. OMP_NUM_THREADS sets the threads; where other programs run, one thread is
fairer, because threads that wait for each other take CPU time.

    python -m scripts.dev.bench.merging --shape llama3-8b --layers 8
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import BENCHMARKS, SHAPES, append, heading, run_child

TARGET = BENCHMARKS / "merging.md"
TITLE = """# Memory and speed of a merge

Random Llama checkpoints in bf16 merged to fp16: `python -m scripts.dev.bench.merging`. The bound on memory is 400 MB
and four times the largest tensor in fp32. A copy reads the same files, casts and writes: by file with safetensors'
load_file and save_file, or as a stream of blocks, the least work possible. All read from the disk and are synced
to it.
"""
WAYS = ("by file", "stream", "original", "dequantized", "dequantized", "original", "stream", "by file")


def main() -> None:
    """Make the files, measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="limits")
    parser.add_argument("--layers", type=int, help="number of layers, if the disk is too small for the shape's")
    parser.add_argument("--vocabulary", type=int, help="size of the vocabulary, if not the shape's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="folder of the temporary files")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, folder = arguments.measure
        print(json.dumps(measure(way, Path(folder))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        given = {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
        sizes = SHAPES[arguments.shape] | {name: size for name, size in given.items() if size is not None}
        largest = make_files(folder, sizes, arguments.rank)
        checkpoint = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / 1e6
        found: dict[str, list[dict[str, float]]] = {}
        for way in WAYS:
            forget(folder / "base")
            found.setdefault(way, []).append(run_child(__spec__.name, "--measure", way, name))
            print(way, found[way][-1])
            shutil.rmtree(folder / "out")
    bound = 400 + 4 * largest
    lines = [
        *heading(f"{arguments.shape}, {checkpoint:,.0f} MB", "torch", "safetensors", "bitsandbytes"),
        f"The largest tensor has {largest:,.0f} MB in fp32, so the bound is {bound:,.0f} MB. Threads: "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')}.",
        "",
        "| way | seconds | CPU seconds | peak MB | speed ÷ by file | CPU | speed ÷ stream | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    best = {way: {key: min(run[key] for run in runs) for key in ("seconds", "cpu")} for way, runs in found.items()}
    for way, runs in found.items():
        cells = [", ".join(f"{run[key]:.1f}" for run in runs) for key in ("seconds", "cpu")]
        cells.append(f"{max(run['peak'] for run in runs):.0f}")
        for copy in ("by file", "stream"):
            cells += [f"{best[copy][key] / best[way][key]:.2f}" for key in ("seconds", "cpu")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    print("\n".join(lines))
    append(TARGET, TITLE, lines)


def make_files(folder: Path, sizes: dict[str, int], rank: int) -> float:
    """Write a base and a run on it without building a model; return the size of its largest tensor in fp32, MB."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from qlora.files import BaseFiles
    from qlora.files.shards import ShardWriter, TensorLayout
    from scripts.dev.fuzzing.samples import RECORD

    base, run = folder / "base", folder / "run"
    (run / "adapter").mkdir(parents=True)
    config = LlamaConfig(**{"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]} | sizes)
    config.save_pretrained(base)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    for place in (base, run / "adapter"):
        tokenizer.save_pretrained(place)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    writer = ShardWriter(base, [TensorLayout(name, one, torch.bfloat16) for name, one in shapes.items()], 5 * 10**9)
    values = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    for number, (name, one) in enumerate(shapes.items()):
        # Each tensor from another place on, so that the head is not the embedding again.
        writer.write_blocks(name, repeated(values.roll(number), torch.Size(one).numel()))
    writer.close()

    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linears.remove("lm_head")
    factors = {}
    for name in linears:
        rows, columns = shapes[f"{name}.weight"]
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns).to(torch.bfloat16)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank).mul_(1e-3).to(torch.bfloat16)
    save_file(factors, run / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    record = RECORD | {
        "data": [],
        "base": RECORD["base"] | {"name": str(base), "files": BaseFiles.resolve(str(base)).fingerprint()},
        "parameters": RECORD["parameters"] | {"quantized": linears, "adapted": linears, "trained_rows": {}},
    }
    settings = {"model": {"base": str(base)}, "data": {"train": "none"}, "train": {"output_dir": str(run)}}
    for path, content in (("adapter/adapter_config.json", adapter), ("run.json", record), ("config.yaml", settings)):
        (run / path).write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return max(torch.Size(one).numel() for one in shapes.values()) * 4 / 1e6


def forget(base: Path) -> None:
    """Drop the files from the page cache, so that each way reads them from the disk."""
    os.sync()
    for path in base.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def repeated(values: Any, num_values: int) -> Iterator[Any]:
    """Return the values, repeated until there are enough."""
    while num_values:
        yield values[:num_values]
        num_values -= min(num_values, len(values))


def measure(way: str, folder: Path) -> dict[str, float]:
    """Copy or merge; return the memory and time that it took, in MB and seconds."""
    import bitsandbytes  # noqa: F401  (imported before, as all that is not the model's)
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from qlora.export import merge

    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident memory
    before, started, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    if way == "by file":
        copy_by_file(folder / "base", folder / "out")
    elif way == "stream":
        copy_as_stream(folder / "base", folder / "out")
    else:
        merge(folder / "run", folder / "out", "float16", onto=way)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"peak": resident("VmHWM") - before, "seconds": seconds, "cpu": cpu}


def copy_by_file(base: Path, out: Path) -> None:
    """Convert in the obvious way, file by file."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for path in sorted(base.glob("*.safetensors")):
        save_file({name: value.to(torch.float16) for name, value in load_file(path).items()}, out / path.name)
        descriptor = os.open(out / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy_as_stream(base: Path, out: Path) -> None:
    """Convert as a stream of blocks, the least work for a conversion."""
    import torch

    from qlora.files import BaseFiles
    from qlora.files.shards import ShardWriter, TensorLayout
    from qlora.files.stored import StoredTensors, row_blocks

    out.mkdir()
    files = BaseFiles.resolve(str(base))
    stored = StoredTensors(files.headers)
    layout = [TensorLayout(name, stored.shape(name), torch.float16) for name in files.tensors]
    writer = ShardWriter(out, layout, 5 * 10**9)
    for entry in layout:
        blocks = (stored.read(entry.name, rows).to(entry.dtype) for rows in row_blocks(entry.shape))
        writer.write_blocks(entry.name, blocks)
    writer.close()


def resident(key: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
