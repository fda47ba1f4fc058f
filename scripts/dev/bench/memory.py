"""Count the memory and work of a training step: the same numbers on every run, regardless of the machine's load.

For qlora at each level of recomputation, for PEFT + bitsandbytes with transformers' loss, and for TRL's SFTTrainer on
them, if they are installed, on a Llama with random weights: bytes held between forward and backward, floating-point
operations, products with a base weight and its dequantizations, and reasons for the host to wait for a device. A table
is printed; `--out` appends it to a page.

    python -m scripts.dev.bench.memory --out docs/benchmarks/memory.md
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from scripts.dev.bench.common import (
    SHAPES,
    TOKENIZER,
    append,
    build_peft,
    build_qlora,
    heading,
    installed,
    make_base,
    peft_loss,
    random_rows,
    recompute_levels,
    shape_name,
)
from scripts.dev.bench.counts import Held, Watch, Work, held_for_backward

PEFT_SETTINGS = ("none", "none+bf16", "none+autocast", "full", "full+prepare", "full+autocast")
TRL_SETTINGS = ("none+autocast", "full+autocast")
TITLE = """# Memory and work of a training step

Counts, not timings: the same on every run. `python -m scripts.dev.bench.memory --out docs/benchmarks/memory.md`.

- **Saved**: bytes per token that autograd saves from the forward to the backward, each storage once and whole,
  without the model's own; **on ctx**: the same, in attributes of custom functions, where no saved-tensor hook sees
  it; **alive**: bytes per token of every storage that the forward made and that exists at its end, through any
  reference, also in closures (where checkpointed layers keep rotary tables).
- **MFLOP/token**: matrix products and attention, half of it if causal, forward + backward; recomputation counts
  with the backward.
- **Base GEMMs** and **dequantized** weights: per layer, forward + backward; each dequantized weight with its
  statistics is two calls of bitsandbytes if statistics are quantized too.
- **Syncs**: per optimizer step, operations for which the host would wait for a GPU: for qlora in `run_loop`,
  including the reported loss and norm; for PEFT in forward, backward, clipping and reading the loss, without its
  optimizer (bitsandbytes' synchronizes once for every parameter on a GPU).

PEFT's `prepare` is `prepare_model_for_kbit_training`, `bf16` stores factors in bf16 instead of fp32; `autocast` is
transformers' `bf16=True`, without which PEFT multiplies its fp32 factors in fp32. Its gradient checkpointing is
transformers', not reentrant. TRL is its SFTTrainer with its default loss, which makes no logits of a whole batch.
"""


def main() -> None:
    """Count, print, and append to `--out` if it is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="limits", help=f"{', '.join(SHAPES)}, or the path of a config.json")
    parser.add_argument(
        "--tokenizer", type=Path, default=TOKENIZER, help="tokenizer that is saved with the random model"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--qlora-only", action="store_true")
    parser.add_argument("--out", type=Path, help="page to append the table to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder), arguments.shape, arguments.tokenizer)
        lines = table(arguments, folder)
    print("\n".join(lines))
    if arguments.out:
        append(arguments.out, TITLE, lines)


def table(arguments: argparse.Namespace, base: str) -> list[str]:
    """Count every setting of both sides."""
    title = f"{shape_name(arguments.shape)}, rank {arguments.rank}, {arguments.batch} × {arguments.seq_len} tokens"
    lines = [
        *heading(title, "torch", "bitsandbytes", "transformers", "peft", "trl"),
        "| side | recompute | saved B/token | on ctx | alive B/token | MFLOP/token | base GEMMs per layer "
        "| dequantized per layer | with statistics | syncs per step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    tokens = arguments.batch * arguments.seq_len
    for level in recompute_levels():
        lines.append(row("qlora", level, tokens, *count_qlora(arguments, base, level)))
    if arguments.qlora_only:
        return lines
    if not installed("peft"):
        return [*lines, "", "peft is not installed, so its rows are missing."]
    for setting in PEFT_SETTINGS:
        lines.append(row("PEFT", setting, tokens, *count_peft(arguments, base, setting)))
    if not installed("trl"):
        return [*lines, "", "trl is not installed, so its rows are missing."]
    for setting in TRL_SETTINGS:
        lines.append(row("TRL", setting, tokens, *count_trl(arguments, base, setting)))
    return lines


def row(
    side: str, setting: str, tokens: int, layers: int, held: Held, forward: Work, backward: Work, syncs: Any
) -> str:
    """Return one line of the table."""
    held_cells = " | ".join(f"{size / tokens:,.0f}" for size in (held.saved, held.hung, held.alive))
    flops = " + ".join(f"{work.flops / tokens / 1e6:.1f}" for work in (forward, backward))
    gemms = " + ".join(f"{work.base_gemms / layers:g}" for work in (forward, backward))
    weights = " + ".join(f"{work.dequantized / layers:g}" for work in (forward, backward))
    calls = " + ".join(f"{work.dequantized_statistics / layers:g}" for work in (forward, backward))
    waits = ", ".join(f"{count} {name}" for name, count in sorted(syncs.items())) or "none"
    total = (forward.flops + backward.flops) / tokens / 1e6
    cells = [side, setting, held_cells, f"{flops} = {total:.1f}", gemms, weights, calls]
    return f"| {' | '.join(cells)} | {sum(syncs.values())}: {waits} |"


def count_qlora(arguments: argparse.Namespace, base: str, level: str) -> tuple[int, Held, Work, Work, Counter[str]]:
    """Return the counts of a step of qlora at a level of recomputation."""
    import numpy as np

    from qlora.data import BatchPlan, collate
    from qlora.model import SUPERVISED, supervised_loss
    from qlora.optim import FlatAdamW, FlatParameters
    from qlora.processes import Processes
    from qlora.training.loop import LoopCallbacks, LoopParts, LoopSchedule, run_loop
    from qlora.training.progress import Progress

    model, _ = build_qlora(base, arguments.rank, 2 * arguments.rank, level)
    flat = FlatParameters((name, p) for name, p in model.named_parameters() if p.requires_grad)
    examples = make_examples(arguments, model)
    batch = collate(examples[: arguments.batch]).to(model.device)
    held, forward, backward = count(lambda: supervised_loss(model, batch) / batch.total_weight, model)

    counted: list[Counter[str]] = []
    plan = BatchPlan(np.full(len(examples), arguments.seq_len), arguments.batch, 1)
    with Watch(model.device) as work:
        # The first step also checks that the gradient reaches every adapter.
        run_loop(
            LoopParts(
                model, FlatAdamW(flat), SUPERVISED, examples, batches=plan, processes=Processes(device=model.device)
            ),
            Progress(),
            LoopSchedule(2, lambda _: 1e-4, 1.0),
            LoopCallbacks(lambda _: counted.append(work.syncs.copy()) is None),
        )
    return model.config.num_hidden_layers, held, forward, backward, counted[1] - counted[0]


def count_peft(arguments: argparse.Namespace, base: str, setting: str) -> tuple[int, Held, Work, Work, Counter[str]]:
    """Return the counts of PEFT's step, as transformers' trainer makes it."""
    from qlora.data import collate

    model, _ = build_peft(base, arguments.rank, 2 * arguments.rank, setting)
    batch = collate(make_examples(arguments, model)[: arguments.batch]).to(model.device)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled="autocast" in setting)

    def loss() -> torch.Tensor:
        with autocast:
            return peft_loss(model, batch)

    return count_peer(loss, model)


def count_trl(arguments: argparse.Namespace, base: str, setting: str) -> tuple[int, Held, Work, Work, Counter[str]]:
    """Return the counts of a step of TRL's SFTTrainer on PEFT's model, with the trainer's own loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = build_peft(base, arguments.rank, 2 * arguments.rank, setting)
    rows = [example.input_ids.tolist() for example in make_examples(arguments, model)[: arguments.batch]]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            bf16=True,
            use_cpu=model.device.type == "cpu",
            gradient_checkpointing="full" in setting,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_length=arguments.seq_len,
            report_to=[],
        )
        dataset = Dataset.from_list([{"input_ids": row} for row in rows])
        trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    ids = torch.tensor(rows, device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss() -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            computed: torch.Tensor = trainer.compute_loss(trainer.model, batch)
        return computed

    return count_peer(loss, trainer.model.train())


def count_peer(loss: Any, model: Any) -> tuple[int, Held, Work, Work, Counter[str]]:
    """Return the counts of a step of another trainer: its loss, backward, and clipping."""
    held, forward, backward = count(loss, model)
    with Watch(model.device) as work:
        step_loss = loss()
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        step_loss.item()
    return model.config.num_hidden_layers, held, forward, backward, work.syncs


def count(loss: Any, model: Any) -> tuple[Held, Work, Work]:
    """Return the bytes that a forward holds, and the work of it and its backward."""
    loss().backward()  # a first run may fill caches
    held = held_for_backward(loss, model)
    with Watch(model.device) as forward:
        value = loss()
    with Watch(model.device) as backward:
        value.backward()
    return held, forward, backward


def make_examples(arguments: argparse.Namespace, model: Any) -> list[Any]:
    """Return two batches of full sequences in which every token is supervised."""
    from qlora.data import make_example

    rows = random_rows(2 * arguments.batch, arguments.seq_len, model.config.vocab_size)
    return [make_example(row, [True] * len(row)) for row in rows]


if __name__ == "__main__":
    main()
