"""Check architectures of transformers with tiny random models, and write their rows in docs/support.md.

    python -m scripts.dev.support                 # all; takes an hour on one core
    python -m scripts.dev.support llama qwen3     # only these rows

With peft installed. The tokenizer is that of `QLORA_REALDATA`, or of `--tokenizer`.
"""

import argparse
import json
import os
from pathlib import Path

from scripts.dev.bench.common import REALDATA, ROOT
from scripts.dev.support.page import read_rows, row_of, write_page
from scripts.dev.support.run import architectures, check_all


def main() -> None:
    """Check the architectures and rewrite their rows of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; default: all")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "support.md")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--limit", type=int, default=240, help="seconds for each")
    parser.add_argument("--tokenizer", type=Path, default=REALDATA / "tokenizers" / "minimind")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in architectures()]
    if unknown:
        parser.error(f"transformers has no causal language model of the type {', '.join(unknown)}")
    rows = read_rows(arguments.out)
    names = arguments.names or list(architectures())
    for name, found in check_all(names, arguments.tokenizer, arguments.jobs, arguments.limit):
        rows[name] = row_of(name, found)
        print(json.dumps({name: found}), flush=True)
        write_page(arguments.out, rows)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
