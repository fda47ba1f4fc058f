"""Measure tokens per second from a file on disk to masked and packed examples, for qlora and TRL's SFTTrainer.

The rows of a file of conversations are written several times over, a number appended to each question, once as
`messages` and once as `prompt` and `completion`. Each side prepares them in a process of its own with an empty cache,
in the order A B B A: ours with `build_datasets` and `BatchPlan`, TRL's as SFTTrainer does it itself, with one process
and with two. A table is appended to docs/benchmarks/tokenizing.md.

    python -m scripts.dev.bench.tokenizing --repeat 10 --tokenizer FOLDER FOLDER --template FILE
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[3] / "docs" / "benchmarks" / "tokenizing.md"
TITLE = """# From a file to packed examples

Tokens per second from a file on disk to packed examples with masks, with empty caches:
`python -m scripts.dev.bench.tokenizing`. Measured are `build_datasets` and `BatchPlan` of qlora, and `load_dataset` and
SFTTrainer's own preparation of TRL, without imports and the loading of tokenizer and model. Each runs in its own
process, in the order A B B A. `again` is the seconds of a new process with the cache of an earlier one; CPU seconds are
of all cores, and are more reliable than the clock if other programs ran too.
"""
# qlora, TRL with one process, TRL with two; and back.
SIDES = ("qlora", "trl", "trl2")
FORMS = ("messages", "completion")


def main() -> None:
    """Measure, print and append the table; with --side, be one of the measured processes."""
    realdata = Path(os.environ.get("QLORA_REALDATA", "../shared/realdata"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default=str(realdata / "data" / "llama_factory_demo" / "alpaca_en_demo.json"))
    parser.add_argument("--repeat", type=int, default=10, help="number of copies of each row")
    names = ("minimind", "qwen3")
    parser.add_argument("--tokenizer", nargs="+", default=[str(realdata / "tokenizers" / name) for name in names])
    template = realdata / "chat_templates" / "trl" / "qwen3_training.jinja"
    parser.add_argument(
        "--template", default=str(template), help="template for `messages`, with generation marks for TRL"
    )
    parser.add_argument(
        "--model", default=str(realdata / "models" / "stories260K-hf"), help="model that SFTTrainer needs"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(MEASURES[arguments.side](arguments)))
        return
    lines = table(arguments)
    print("\n".join(lines))
    if not arguments.out.exists():
        arguments.out.write_text(TITLE, encoding="utf-8")
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *lines, ""]))


def table(arguments: argparse.Namespace) -> list[str]:
    """Run all sides twice for each tokenizer and form, and each once more with its cache."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "datasets", "transformers", "tokenizers"))
    lines = [
        f"## {date.today()}: {Path(arguments.file).name}, each row {arguments.repeat} times, rows of up to "
        f"{arguments.seq_len} tokens",
        "",
        f"{os.cpu_count()} cores of {processor()}; load before the runs {os.getloadavg()[0]:.1f}; {packages}",
        "",
        "| tokenizer | form | side | tokens | supervised | rows | seconds (2 runs) | CPU seconds | tokens/s | again |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tokenizer in arguments.tokenizer:
        for form in arguments.form:
            with tempfile.TemporaryDirectory() as folder:
                results = run(arguments, tokenizer, form, Path(folder))
            best = {side: max(run["tokens"] / run["seconds"] for run in runs[:2]) for side, runs in results.items()}
            for side, (first, second, again) in results.items():
                name = {"qlora": "qlora", "trl": "TRL", "trl2": "TRL, dataset_num_proc=2"}[side]
                lines.append(
                    f"| {Path(tokenizer).name} | {form} | {name} | {first['tokens']:,} | {first['supervised']:,} "
                    f"| {first['rows']:,} | {first['seconds']:.2f}, {second['seconds']:.2f} "
                    f"| {first['cpu']:.1f}, {second['cpu']:.1f} | {best[side]:,.0f} "
                    f"| {again['seconds']:.2f} |"
                )
            ratios = f"{best['qlora'] / best['trl']:.2f}, {best['qlora'] / best['trl2']:.2f}"
            lines.append(
                f"| {Path(tokenizer).name} | {form} | ours ÷ TRL's, one process and two | | | | | | {ratios} | |"
            )
    return lines


def run(arguments: argparse.Namespace, tokenizer: str, form: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Make two cold runs of each side, and one with the cache of the last."""
    data = folder / "rows.jsonl"
    write_rows(arguments.file, data, arguments.repeat, form)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number, side in enumerate((*SIDES, *reversed(SIDES), *SIDES)):
        # The last three start with the cache of the run before them.
        cache = folder / f"{side}{min(number // len(SIDES), 1)}"
        command = [sys.executable, "-m", __spec__.name, "--file", str(data), "--tokenizer", tokenizer, "--form", form]
        command += ["--template", arguments.template, "--model", arguments.model]
        command += ["--seq-len", str(arguments.seq_len), "--side", side, "--cache", str(cache)]
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        results[side].append(json.loads(output.splitlines()[-1]))
    return results


def write_rows(source: str, target: Path, repeat: int, form: str) -> None:
    """Write the conversations of a file, each several times with a number after its question."""
    from qlora.data.formats import COLUMNS, RowReader
    from qlora.data.rows import read_rows
    from qlora.data.sources import Source
    from qlora.data.tables import HeaderRule

    reader, rule = RowReader(), HeaderRule("auto", (), COLUMNS)
    conversations = [reader.read(row).messages for row in read_rows(Source(source), rule)]
    with target.open("w", encoding="utf-8") as file:
        for number in range(repeat):
            for index, (*before, question, answer) in enumerate(conversations):
                asked = {**question, "content": f"{question['content']} ({number * len(conversations) + index})"}
                prompt = [*before, asked]
                is_whole = form == "messages"
                row = {"messages": [*prompt, answer]} if is_whole else {"prompt": prompt, "completion": [answer]}
                file.write(json.dumps(row) + "\n")


def measure_qlora(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure qlora, from the file to packed sequences."""
    from transformers import AutoTokenizer

    from qlora.data import BatchPlan, EncodeOptions, Source, build_datasets

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer[0])
    template = arguments.template if arguments.form == ["messages"] else "auto"
    options = EncodeOptions(max_seq_len=arguments.seq_len, overlong="truncate")
    started, cpu = time.perf_counter(), cpu_seconds()
    sources = [Source(arguments.file)]
    datasets = build_datasets(tokenizer, sources, 0.0, options, template, cache_dir=arguments.cache)
    plan = BatchPlan(datasets.train.lengths, 1, 16, arguments.seq_len)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    report = datasets.reports[0]
    return {
        "seconds": seconds,
        "cpu": cpu,
        "tokens": report.tokens,
        "supervised": report.supervised_tokens,
        "rows": len(plan.rows),
    }


def measure_trl(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure TRL, as its trainer prepares a dataset when it is built."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    prepared: dict[str, float] = {}

    class TimedTrainer(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, *positional: Any, **named: Any) -> Any:
            started, cpu = time.perf_counter(), cpu_seconds()
            result = super()._prepare_dataset(*positional, **named)
            prepared.update(seconds=time.perf_counter() - started, cpu=cpu_seconds() - cpu)
            return result

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer[0])
    has_marks = arguments.form == ["messages"]
    if has_marks:
        tokenizer.chat_template = Path(arguments.template).read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    num_proc = 2 if arguments.side == "trl2" else None
    started, cpu = time.perf_counter(), cpu_seconds()
    rows = datasets.load_dataset("json", data_files=arguments.file, split="train")
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=arguments.seq_len,
            assistant_only_loss=has_marks,
            dataset_num_proc=num_proc,
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        trainer = TimedTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    packed = trainer.train_dataset.with_format("numpy")
    return {
        "seconds": seconds + prepared["seconds"],
        "cpu": cpu + prepared["cpu"],
        "tokens": sum(len(row["input_ids"]) for row in packed),
        "supervised": sum(int((row["labels"] != -100).sum()) for row in packed),
        "rows": len(packed),
    }


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and those it waited for, which other programs barely change."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


MEASURES = {"qlora": measure_qlora, "trl": measure_trl, "trl2": measure_trl}

if __name__ == "__main__":
    main()
