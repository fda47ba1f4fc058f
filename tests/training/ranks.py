"""Trains configs under a launcher, each process its own: `torchrun … -m tests.training.ranks FILE`.

FILE is JSON: for each case the config file of every process and the step to stop at. Prints one JSON line per process.
"""

import json
import os
import sys
from pathlib import Path

from qlora.config import load_config
from qlora.errors import QLoRAError
from qlora.training import train


def outcome(config: str, stop_at: int | None) -> list[object]:
    """Status and steps of a run, or its error."""
    try:
        result = train(load_config(config), stop_at=stop_at)
    except QLoRAError as error:
        return [type(error).__name__, str(error)]
    return [result.status, result.steps]


def main() -> None:
    """Trains every case in order; a case's error ends it on all processes, and the next one starts."""
    rank = int(os.environ["RANK"])
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {name: outcome(case["configs"][rank], case.get("stop_at")) for name, case in cases.items()}
    print(json.dumps({"rank": rank, "found": found}), flush=True)


if __name__ == "__main__":
    main()
