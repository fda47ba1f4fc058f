"""Compare losses and gradients of preference objectives with TRL's trainers on the same tensors.

TRL tokenizes a few pairs or rated answers of a small real model, and computes its trainer's loss and the gradient of
its adapter; qlora computes both for the same tokens with the same factors. The base is in fp32 on both sides. A table
is appended to docs/benchmarks/preferences.md.

    python -m scripts.dev.bench.trl_losses
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.dev.bench.common import BENCHMARKS, REALDATA, append, heading

TARGET = BENCHMARKS / "preferences.md"
TITLE = "# Preference objectives\n"
RANK, ALPHA = 4, 8
PAIRS = [
    {"prompt": "Once upon a time", "chosen": " there was a little girl who liked to play.", "rejected": " no no no"},
    {"prompt": "The dog", "chosen": " ran to the park", "rejected": " was very sad because the sun did not shine."},
    {"prompt": "One day", "chosen": " Tom went home.", "rejected": " table"},
    {"prompt": "Lily said", "chosen": ' "Hello!"', "rejected": " nothing at all to her big friend"},
]


@dataclass(frozen=True)
class Case:
    """A trainer of TRL with settings, and the same objective here.

    Attributes:
        name: Our objective.
        options: Our options.
        trainer: Returns TRL's trainer class and config class.
        settings: Arguments of TRL's config.
        num_pairs: Number of pairs.
    """

    name: str
    options: dict[str, Any]
    trainer: Callable[[], tuple[Any, Any]]
    settings: dict[str, Any]
    num_pairs: int = 4


def _dpo() -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer, DPOConfig


def _kto() -> tuple[Any, Any]:
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig


def _cpo() -> tuple[Any, Any]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer, CPOConfig


def _orpo() -> tuple[Any, Any]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig


# The chosen answers' own loss is a mean over pairs here and over all tokens there, so it is compared on one pair.
CASES = [
    Case("dpo", {"beta": 0.3}, _dpo, {"beta": 0.3, "loss_type": "sigmoid"}),
    Case("ipo", {"beta": 0.3}, _dpo, {"beta": 0.3, "loss_type": "ipo"}),
    Case("simpo", {"beta": 2.0, "gamma": 0.7}, _cpo,
         {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    Case("simpo", {"beta": 2.0, "label_smoothing": 0.1}, _cpo,
         {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0, "label_smoothing": 0.1}),
    Case("cpo", {"beta": 0.1, "sft_weight": 0.0}, _cpo, {"beta": 0.1, "loss_type": "sigmoid", "cpo_alpha": 0.0}),
    Case("cpo", {"beta": 0.1, "sft_weight": 0.7}, _cpo,
         {"beta": 0.1, "loss_type": "sigmoid", "cpo_alpha": 0.7}, num_pairs=1),
    Case("orpo", {"beta": 0.2, "sft_weight": 0.0}, _orpo, {"beta": 0.2}),
    Case("kto", {"beta": 0.4, "desirable_weight": 1.3}, _kto, {"beta": 0.4, "desirable_weight": 1.3}),
]  # fmt: skip


def main() -> None:
    """Compare, print and append the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(REALDATA / "models" / "stories260K-hf"))
    base = parser.parse_args().base
    lines = [
        *heading("losses and gradients compared with TRL", "torch", "transformers", "trl", "peft"),
        "`python -m scripts.dev.bench.trl_losses`. A real model of 260,032 parameters in fp32, four pairs (KTO: their",
        "eight answers; CPO with `sft_weight`: one pair), factors of rank 4 that are not zero. ORPO without the chosen",
        "answer's own loss, which TRL computes over prompt and answer and qlora over the answer.",
        "",
        "| objective | options | loss (TRL) | loss (qlora) | relative difference | of the gradient |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        theirs, ours, gradient = compare(case, base)
        options = ", ".join(f"{key} {value}" for key, value in case.options.items())
        lines.append(
            f"| {case.name} | {options} | {theirs:.7f} | {ours:.7f} | {abs(theirs - ours) / abs(theirs):.1e} | "
            f"{gradient:.1e} |"
        )
    print("\n".join(lines))
    append(TARGET, TITLE, lines)


def compare(case: Case, base: str) -> tuple[float, float, float]:
    """Return TRL's loss, ours, and the largest relative difference of the gradient of a factor."""
    import torch

    from qlora.lora import add_lora, lora_layers
    from qlora.model import load_base

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, base, Path(folder))
    batch = next(iter(trainer.get_train_dataloader()))
    theirs_model = trainer.model.train()
    generator = torch.Generator().manual_seed(0)
    factors = {name: p for name, p in theirs_model.named_parameters() if p.requires_grad}
    for parameter in factors.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs = their_loss(case, trainer, theirs_model, batch)
    theirs.backward()

    model, _ = load_base(base, "none", compute_dtype="float32", device="cpu")
    add_lora(model, rank=RANK, alpha=ALPHA, dtype=torch.float32)
    layers = dict(lora_layers(model))
    expected = {}
    for name, parameter in factors.items():
        layer, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        ours_parameter = getattr(layers[layer], f"lora_{factor[0]}")
        ours_parameter.data.copy_(parameter.data)
        expected[ours_parameter] = parameter.grad
    loss, documents = our_loss(case), our_documents(case.name, batch)
    from qlora.data import collate

    collated = collate(documents)
    (step,) = loss.training_passes(model.train(), collated)
    ours = step.total / loss.units(collated)
    ours.backward()
    differences = [
        ((own.grad - wanted).norm() / wanted.norm()).item() for own, wanted in expected.items() if wanted.norm() > 0
    ]
    return theirs.item(), ours.item(), max(differences)


def their_loss(case: Case, trainer: Any, model: Any, batch: dict[str, Any]) -> Any:
    """Return TRL's loss of a batch; for ORPO the part of the odds ratio."""
    if case.name == "orpo":
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
        return -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    loss = trainer.compute_loss(model, batch)
    return loss[0] if isinstance(loss, tuple) else loss


def make_trainer(case: Case, base: str, folder: Path) -> Any:
    """Return TRL's trainer with a new adapter on the base in fp32."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer_class, config_class = case.trainer()
    config = config_class(
        output_dir=str(folder), per_device_train_batch_size=8, use_cpu=True, report_to=[], bf16=False,
        gradient_checkpointing=False, max_length=256, remove_unused_columns=False, **case.settings,
    )  # fmt: skip
    rows = PAIRS[: case.num_pairs]
    if case.name == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in PAIRS
            for side in ("chosen", "rejected")
        ]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer_class(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=adapters,
    )  # fmt: skip


def our_loss(case: Case) -> Any:
    """Return our loss of a case."""
    from qlora.config import TrainSection
    from qlora.objectives import objective_from_section

    return objective_from_section(
        TrainSection(objective=case.name, output_dir="run", preference=case.options)  # type: ignore[arg-type]
    ).loss


def our_documents(name: str, batch: dict[str, Any]) -> list[Any]:
    """Return the documents of a batch of TRL's, in our order: chosen and rejected, or rated and mismatched."""
    if name == "kto":
        own = documents(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        others = documents(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
        return [
            part
            for one, other, is_good in zip(own, others, batch["label"], strict=True)
            for part in (rated(one, 1 if is_good else -1), rated(other, 0))
        ]
    if "chosen_input_ids" in batch:
        sides = [
            documents(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        ]
    else:
        every = documents(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        sides = [every[: len(every) // 2], every[len(every) // 2 :]]
    return [document for pair in zip(*sides, strict=True) for document in pair]


def documents(ids: Any, attended: Any, supervised: Any) -> list[Any]:
    """Return the documents of padded tensors."""
    from qlora.data.tokens import make_example

    return [
        make_example(row[mask.bool()].tolist(), weights[mask.bool()].tolist())
        for row, mask, weights in zip(ids, attended, supervised, strict=True)
    ]


def rated(document: Any, rating: int) -> Any:
    """Return a document with its rating."""
    from dataclasses import replace

    import numpy as np

    return replace(document, values={"rating": np.int8(rating)})


if __name__ == "__main__":
    main()
