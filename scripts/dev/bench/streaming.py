"""Measure host memory and time while a large file is tokenized and packed.

Writes conversations of random words as JSON lines into a temporary folder, prepares them in a new process that samples
its own memory ten times a second, and prepares them a second time from the cache of the first. A table is appended to
docs/benchmarks/tokenizing.md. The folder needs three times the size of the file.

    python -m scripts.dev.bench.streaming --megabytes 2000 --tokenizer FOLDER
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[3] / "docs" / "benchmarks" / "tokenizing.md"
SHARES = (0.1, 0.5, 1.0)
WORDS, SYLLABLES = 20_000, ("ka", "lo", "mi", "ren", "su", "ta", "vo", "nis", "per", "dol", "ge", "an", "qui", "the")
ROW_CHARACTERS = (500, 4000)


def main() -> None:
    """Write the file, measure, print and append; with --measure, be one of the measured processes."""
    realdata = Path(os.environ.get("QLORA_REALDATA", "../shared/realdata"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--tokenizer", default=str(realdata / "tokenizers" / "minimind"))
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--folder", help="folder to work in, if the system's temporary folder is too small")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", arguments.megabytes * 10**6)
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--tokenizer",
            arguments.tokenizer,
            "--seq-len",
            str(arguments.seq_len),
        ]
        command += ["--measure", folder]
        load = os.getloadavg()[0]
        first, again = (
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            for _ in range(2)
        )
    lines = table(arguments, rows, load, first, again)
    print("\n".join(lines))
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *lines, ""]))


def table(
    arguments: argparse.Namespace, rows: int, load: float, first: dict[str, Any], again: dict[str, Any]
) -> list[str]:
    """Return the measurements as a table for people."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))
    megabytes = {key: [f"{value / 1e6:.0f}" for value in first[key]] for key in ("anonymous", "resident")}
    return [
        f"## {date.today()}: {arguments.megabytes} MB of JSON lines, {rows:,} conversations, "
        f"{first['tokens']:,} tokens of {Path(arguments.tokenizer).name}",
        "",
        f"{os.cpu_count()} cores; load before the runs {load:.1f}; {packages}. Peaks in MB until that share "
        "of the tokens was written, above what was resident after the imports; the last column has packing in it too.",
        "",
        "| memory | 10 % | 50 % | 100 % | with packing |",
        "|---|---|---|---|---|",
        f"| anonymous (RssAnon) | {' | '.join(megabytes['anonymous'])} |",
        f"| resident (VmRSS, mapped files too) | {' | '.join(megabytes['resident'])} |",
        "",
        f"First start {first['seconds']:.1f} s, {first['tokens'] / first['seconds']:,.0f} tokens/s; packed into "
        f"{first['packed']:,} rows in {first['packing']:.2f} s of it. Second start {again['seconds']:.1f} s, of which "
        f"packing {again['packing']:.2f} s; anonymous memory then at most {again['anonymous'][-1] / 1e6:.0f} MB.",
    ]


def write_rows(path: Path, size: int) -> int:
    """Write conversations until a file has its size; return how many."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices(SYLLABLES, k=chooser.randint(1, 4))) for _ in range(WORDS)]
    rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            # A text is cut from other words every few hundred rows; drawing every word would take minutes.
            if rows % 256 == 0:
                text = " ".join(chooser.choices(words, k=30_000))
            length = chooser.randint(*ROW_CHARACTERS)
            start = chooser.randrange(len(text) - length)
            question, answer = text[start : start + length // 4], text[start + length // 4 : start + length]
            messages = [
                {"role": "user", "content": f"{rows} {question}"},
                {"role": "assistant", "content": answer.strip()},
            ]
            written += file.write(json.dumps({"messages": messages}) + "\n")
            rows += 1
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare the file; return seconds, tokens and the peaks of memory."""
    from transformers import AutoTokenizer

    from qlora.data import BatchPlan, EncodeOptions, Source, build_datasets

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer(["a b"] * 64)  # starts its threads
    folder = Path(arguments.measure)
    watch = Watch(folder / "cache")
    started = time.perf_counter()
    options = EncodeOptions(max_seq_len=arguments.seq_len, overlong="truncate")
    datasets = build_datasets(tokenizer, [Source(str(folder / "rows.jsonl"))], 0.0, options, cache_dir=str(watch.cache))
    built = time.perf_counter()
    plan = BatchPlan(datasets.train.lengths, 1, 16, arguments.seq_len)
    packed = time.perf_counter()
    return {
        "seconds": packed - started,
        "packing": packed - built,
        "tokens": datasets.reports[0].tokens,
        "packed": len(plan.rows),
        **watch.peaks(),
    }


class Watch:
    """Samples this process's memory and the number of tokens written ten times a second.

    Args:
        cache: Folder that tokens are written to.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._before = self._look()
        self._seen = [self._before]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def peaks(self) -> dict[str, list[int]]:
        """Stop, and return the peaks in bytes until each share of the tokens was written, and of all."""
        self._done.set()
        self._thread.join()
        self._seen.append(self._look())
        total = self._seen[-1][0]
        limits = [share * total for share in SHARES]
        ends = [next(place for place, seen in enumerate(self._seen) if seen[0] >= limit) for limit in limits]
        ends.append(len(self._seen) - 1)
        names = {"anonymous": 1, "resident": 2}
        return {
            name: [max(seen[key] for seen in self._seen[: end + 1]) - self._before[key] for end in ends]
            for name, key in names.items()
        }

    def _run(self) -> None:
        while not self._done.wait(0.1):
            self._seen.append(self._look())

    def _look(self) -> tuple[int, int, int]:
        """Return the bytes of tokens written, of anonymous memory and of all resident memory."""
        # Hidden folders too: an entry takes its name when it is whole.
        written = max((entry.stat().st_size for entry in self.cache.glob("*/input_ids.bin")), default=0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return written, *(int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))


if __name__ == "__main__":
    main()
