"""Measure what the host does per decoder layer and micro-batch, on a CPU with tiny widths.

With widths this small operations take next to no time, so what is left is Python, autograd and the dispatcher: the time
for which a GPU waits where it computes faster than its host. Calls of Python functions and dispatched operations,
views included, are the same on every run. Milliseconds are CPU time of one thread, the least of many micro-batches,
because other programs can only add to it. A layer is the difference between models of 10 and of 2 layers, divided by 8.

The path `cpu` is that of a CPU in fp32, where dequantization, norms and gated products are several operations each. The
path `kernels` is that of a GPU, but for attention, with Triton's kernels replaced by functions that do nothing; what
Triton takes to launch them is not in it.

    python -m scripts.dev.bench.host_time --out docs/benchmarks/launches.md
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import append, build_qlora, heading, make_base
from scripts.dev.bench.counts import with_kernels

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "dtype": "float32",
}
LAYERS = 2, 10
TOKENS, RANK, WARM_UP = 16, 4, 5
PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {"cpu": nullcontext, "kernels": with_kernels}
TITLE = """# Launches and host time of a layer

`pytest tests/layers/test_launches.py -s` counts on a CPU what a GPU would launch;
`python -m scripts.dev.bench.host_time --out docs/benchmarks/launches.md` measures the host's work. Nothing has run on a
GPU.
"""


def main() -> None:
    """Measure, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="page to append the table to")
    arguments = parser.parse_args()
    lines = [
        *heading(f"host work of a layer, {TOKENS} tokens, rank {RANK}, fp32, one thread", "torch", "transformers"),
        "| path | recompute | calls of Python functions | dispatched operations | ms of CPU time |",
        "|---|---|---|---|---|",
        *(row(path, level, arguments.steps) for path in PATHS for level in ("none", "full")),
    ]
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def row(path: str, level: str, steps: int) -> str:
    """Return a line of the table: a layer's work on a path at a level of recomputation."""
    with PATHS[path]():
        few, many = (measure(step_of(layers, level), steps) for layers in LAYERS)
    calls, operations, seconds = ((more - less) / (LAYERS[1] - LAYERS[0]) for less, more in zip(few, many, strict=True))
    return f"| {path} | {level} | {calls:,.0f} | {operations:,.0f} | {1e3 * seconds:.2f} |"


def step_of(layers: int, level: str) -> Callable[[], None]:
    """Return a function that runs a micro-batch through the layers of a tiny Llama, forward and backward."""
    import torch

    from qlora.layers.attention import mask_arguments
    from qlora.optim import FlatParameters

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), {**WIDTHS, "num_hidden_layers": layers})
        model, _ = build_qlora(folder, RANK, 2 * RANK, level)
    model.float()
    FlatParameters([(name, each) for name, each in model.named_parameters() if each.requires_grad])
    ids, places = torch.zeros(1, TOKENS, dtype=torch.long), torch.arange(TOKENS)[None]
    documents = mask_arguments(model, None, torch.tensor([0, TOKENS], dtype=torch.int32), [TOKENS])
    grad = torch.ones(1, TOKENS, model.config.hidden_size, dtype=model.dtype)

    def step() -> None:
        hidden = model.model(input_ids=ids, position_ids=places, use_cache=False, **documents).last_hidden_state
        hidden.backward(grad)

    return step


def measure(step: Callable[[], None], steps: int) -> tuple[int, int, float]:
    """Return the calls of Python functions, the dispatched operations and the CPU seconds of a micro-batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(steps):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    with Operations() as operations:
        step()
    calls = 0

    def count(_frame: Any, event: str, _value: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    step()
    sys.setprofile(None)
    return calls, operations.count, min(times)


if __name__ == "__main__":
    main()
