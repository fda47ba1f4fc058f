"""Measure runs whose weights are split over processes or on the host.

    python -m scripts.dev.bench.placement --part bytes       # memory of each process, while loading and afterwards
    python -m scripts.dev.bench.placement --part equality    # adapters after 20 steps, compared byte by byte
    python -m scripts.dev.bench.placement --part scaling     # tokens per second of one process and of two
    python -m scripts.dev.bench.placement --part estimates   # 70B and 30B-A3B on small GPUs, by their shapes

With --out, tables are appended to a page. On GPUs, processes use one each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import ROOT, append, heading, make_base, random_rows
from scripts.dev.bench.loading import largest_tensor, resident
from scripts.dev.bench.moe import MODELS

GIB, MB = 1 << 30, 1e6
TITLE = """# Weights split over processes, or on the host

`python -m scripts.dev.bench.placement`. Nothing here has run on a GPU yet.
"""
LOADED = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 16,
    "vocab_size": 32_000,
}  # fmt: skip
# Twice as large, of small tensors: where a process has the whole 4-bit base at first, that exceeds the bound.
DEEP = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 88, "num_attention_heads": 8,
    "vocab_size": 8000,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 256,
}  # fmt: skip
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": False,
}  # fmt: skip
# Tokens of a sequence whose speed is measured.
LENGTH = 512
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"lora": {"kind": "dora"}},
    "embedding and head trained": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "experts": {"lora": {"expert_rank": 2}},
    "dpo": {"train": {"objective": "dpo"}},
}
# By the micro-batches of a step, which processes share: where weights are, in how many processes, and the number of
# processes with weights on the device that this is compared with. Sums of three gradients may depend on their order.
COMPARED = {2: {("host", 1): 1, ("sharded", 2): 1}, 3: {("device", 3): 1, ("sharded", 3): 3}}
# A run, the options of `qlora estimate`, and what it should take at most.
ESTIMATED = {
    "llama3_70b_24gb": ("70B", "4090", 1, 20.0),
    "llama3_70b_2x24gb": ("70B", "4090", 2, 21.0),
    "qwen3_30b_a3b_12gb": ("30B", "3060", 1, 10.5e9 / GIB),
}


def launch(count: int, *arguments: str) -> str:
    """Run Python's arguments in a number of processes with one thread each; return what they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment).stdout


def load(base: str, weights: str) -> None:
    """Load a base in this process of several, and print the memory that it took, in MB."""
    import bitsandbytes  # noqa: F401  (imported before, as all that is not the base's)
    import torch

    from qlora.layers.placement import placed_weights
    from qlora.model import load_base, take_inventory
    from qlora.processes import Processes

    processes = Processes.start(on_cpu=not torch.cuda.is_available())
    torch.ones(8, 8) @ torch.ones(8, 8)
    processes.gather(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident memory
    before = resident("VmRSS")
    model, _ = load_base(base, compute_dtype="bfloat16", weights=weights, processes=processes)
    peak, placed = resident("VmHWM") - before, placed_weights(model)
    kept = take_inventory(model).base_bytes
    if placed is not None:
        kept += placed.stored_bytes - sum(placed.layer_bytes) + getattr(placed, "slot_bytes", 0)
    found = processes.gather({"peak": peak, "kept": kept / MB, "resident": resident("VmRSS") - before})
    if processes.is_first:
        print(json.dumps(found))


def measure_bytes() -> list[str]:
    """Return a table of the memory of each process."""
    lines = ["| layers | weights | processes | kept MB | resident MB | peak MB while loading | bound MB |",
             "|---|" + "---|" * 6]  # fmt: skip
    for sizes, runs in ((LOADED, [("device", 1), ("host", 1), ("sharded", 2)]), (DEEP, [("sharded", 2)])):
        with tempfile.TemporaryDirectory() as folder:
            make_base(Path(folder), sizes)
            largest = max(map(largest_tensor, Path(folder).glob("*.safetensors"))) / MB
            for weights, count in runs:
                output = launch(count, "-m", __spec__.name, "--load", folder, "--weights", weights)
                for rank, found in enumerate(json.loads(output.splitlines()[-1])):
                    numbers = (found["kept"], found["resident"], found["peak"], found["kept"] + 2 * largest + 400)
                    name = f"{rank + 1} of {count}" if count > 1 else "1"
                    cells = (sizes["num_hidden_layers"], weights, name, *(f"{number:.0f}" for number in numbers))
                    lines.append(f"| {' | '.join(map(str, cells))} |")
                    print(lines[-1], flush=True)
    return lines


def write_run(folder: Path, name: str, base: Path, kind: str, accumulation: int, **model: Any) -> Path:
    """Write the rows and the config of a run of 20 steps."""
    rows = random_rows(64, 24, 250)
    texts = [" ".join(map(str, row)) for row in rows]
    pairs = [{"prompt": "x", "chosen": text[:40], "rejected": text[40:]} for text in texts]
    data = folder / f"{kind}.jsonl"
    written = pairs if kind == "dpo" else [{"input_ids": row} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    config: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "compute_dtype": "float32", **model},
        "lora": {"rank": 4},
        "data": {"train": str(data), "max_seq_len": 64, "cache_dir": str(folder / "cache")},
        "train": {
            "output_dir": str(folder / name), "max_steps": 20, "micro_batch_size": 1,
            "gradient_accumulation_steps": accumulation, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    for section, values in KINDS[kind].items():
        config[section] |= values
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def compare_adapters() -> list[str]:
    """Return a table of the adapters that runs with weights in different places end with."""
    header = [
        f"{weights} in {count}, and device in {others}"
        for runs in COMPARED.values()
        for (weights, count), others in runs.items()
    ]
    lines = [f"| processes | {' | '.join(header)} |", "|---|" + "---|" * len(header)]
    for kind in KINDS:
        cells = [kind]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = make_small(folder, kind)
            for total, runs in COMPARED.items():
                for weights, count in [("device", 1), *runs]:
                    run = write_run(folder, f"{weights}-{count}-{total}", base, kind, total // count, weights=weights)
                    launch(count, "-m", "qlora", "train", str(run))
                cells += [
                    describe_difference(folder / f"{weights}-{count}-{total}", folder / f"device-{others}-{total}")
                    for (weights, count), others in runs.items()
                ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def describe_difference(run: Path, other: Path) -> str:
    """Say whether two runs end with the same adapter, byte for byte, or how far their losses are apart."""
    adapters = [(each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (run, other)]
    if adapters[0] == adapters[1]:
        return "same bytes"
    lines = ([json.loads(line) for line in (each / "metrics.jsonl").open(encoding="utf-8")] for each in (run, other))
    losses = zip(*([line["loss"] for line in own if "loss" in line] for own in lines), strict=True)
    return f"other bytes, losses within {max(abs(a - b) / b for a, b in losses):.0e}"


def make_small(folder: Path, kind: str) -> Path:
    """Save a small random base for a kind of run."""
    from scripts.dev.bench.common import TOKENIZER

    sizes: Any = SMALL
    if kind == "experts":
        import transformers

        sizes = folder / "sizes"
        own = {**SMALL, "moe_intermediate_size": 36, "num_experts": 6, "num_experts_per_tok": 2}
        transformers.Qwen3MoeConfig(**own, num_key_value_heads=2, head_dim=16).save_pretrained(sizes)
        sizes = str(sizes)
    elif kind == "dpo":
        sizes = {**SMALL, "vocab_size": 32_000}
    make_base(folder / "base", sizes, TOKENIZER if kind == "dpo" else None)
    return folder / "base"


def measure_scaling() -> list[str]:
    """Return a table of the speed of one process and of two, each with one thread, in the order A B B A."""
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base", "limits")
        data = folder / "long.jsonl"
        rows = random_rows(256, LENGTH, 32_000)
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
        for number, count in enumerate((1, 2, 2, 1)):
            output = folder / f"scaling-{number}"
            config = {
                "model": {"base": str(folder / "base"), "compute_dtype": "bfloat16", "weights": "device"},
                "data": {"train": str(data), "eval": None, "max_seq_len": LENGTH, "cache_dir": str(folder / "cache")},
                "train": {
                    "output_dir": str(output), "max_steps": 10, "micro_batch_size": 2,
                    "gradient_accumulation_steps": 4, "save_every": None,
                },
            }  # fmt: skip
            path = folder / f"scaling-{number}.yaml"
            path.write_text(json.dumps(config), encoding="utf-8")
            used = os.times()
            launch(count, "-m", "qlora", "train", str(path))
            now = os.times()
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
            cpu = now.children_user + now.children_system - used.children_user - used.children_system
            found[count].append((statistics.median(speeds[2:]), cpu / count))
            print(count, *found[count][-1], flush=True)
    table = ["| processes | tokens/s of a step (two runs) | CPU seconds of a process |", "|---|---|---|"]
    for count, runs in found.items():
        speeds, seconds = (" and ".join(f"{value:,.0f}" for value in values) for values in zip(*runs, strict=True))
        table.append(f"| {count} | {speeds} | {seconds} |")
    one, two = (sum(speed for speed, _ in runs) for runs in found.values())
    return [*table, "", f"Two processes are {two / one:.2f} times as fast as one."]


def estimate_large() -> list[str]:
    """Return a table of the recipes for bases larger than a GPU, estimated by their shapes."""
    import transformers

    from qlora.config import load_config
    from qlora.training import estimate

    lines = ["| recipe | GPU | level | device GiB | wanted | host GiB | copied GB a step | compute s | copy s "
             "| hidden from tokens |", "|---|---|" + "---|" * 8]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_class, architecture, sizes = MODELS["Qwen3-30B-A3B"]
        shapes = {"70B": ("LlamaConfig", "LlamaForCausalLM", LLAMA_70B), "30B": (config_class, architecture, sizes)}
        for base, (kind, architecture, own) in shapes.items():
            config = getattr(transformers, kind)(**own)
            config.architectures = [architecture]
            config.save_pretrained(folder / base)
        for recipe, (base, gpu, count, wanted) in ESTIMATED.items():
            run = load_config(ROOT / "configs" / f"{recipe}.yaml", [f"model.base={folder / base}"])
            for level in estimate(run, gpu, count).levels:
                own = run.model_copy(update={"model": run.model.model_copy(update={"recompute": level})})
                report = estimate(own, gpu, count)
                place = report.places[report.weights]
                if not place["fits"]:
                    continue
                lines.append(
                    f"| {recipe} | {count} × {gpu} | {level} | {place['total'] / GIB:.2f} | {wanted:.1f} "
                    f"| {place['host_bytes'] / GIB:.2f} | {place['copied_bytes'] / 1e9:.0f} "
                    f"| {place['compute_seconds']:.0f} | {place['copy_seconds']:.0f} | {place['hidden_from']} |"
                )
                print(lines[-1], flush=True)
    return lines


PARTS = {
    "bytes": ("memory of each process, random Llamas of 0.9 and 1.5 billion parameters", measure_bytes),
    "equality": ("adapters after 20 steps, compared with one process and weights on the device", compare_adapters),
    "scaling": ("one process and two, one thread each, weights on the device", measure_scaling),
    "estimates": ("estimated: recipes for bases larger than a GPU, levels that fit", estimate_large),
}


def main() -> None:
    """Measure a part, print its table and append it to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], default="bytes")
    parser.add_argument("--out", type=Path, help="page to append to")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, arguments.weights)
        return
    title, measure = PARTS[arguments.part]
    lines = [*heading(title, "torch", "transformers", "bitsandbytes"), *measure()]
    if arguments.out:
        append(arguments.out, TITLE, lines)


if __name__ == "__main__":
    main()
