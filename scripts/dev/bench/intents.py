"""Teach a small instruct model to name intents, beside PEFT, and follow its release into llama.cpp.

Texts of banking77 become conversations whose answer is the intent's name. The base answers 200 test rows before and
after 200 steps with qlora, and after the same steps with PEFT + bitsandbytes; the run is merged, verified, written as
GGUF and verified again, and llama.cpp answers the same rows. Needs peft, gguf, and llama-cpp-python unless
`--no-llama-cpp`:

    python -m scripts.dev.bench.intents --model FILE.gguf --peft-model FOLDER --out docs/benchmarks/intents.md
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qlora
from qlora.data import BatchPlan, ExampleSet, Question, collate, eval_batches, read_questions
from qlora.model import answer_all, datasets_from_section, evaluate
from qlora.model.answer_metrics import exact_match
from qlora.training.schedule import learning_rate, resolve_total_steps
from scripts.dev.bench.classification import banking77, write
from scripts.dev.bench.common import append, build_peft, heading, peft_loss

TITLE = """# Intents as text
"""
SYSTEM = "Name the intent of the customer's message."
NUM_QUESTIONS, MAX_ANSWER, MAX_TOKENS = 200, 16, 1 << 14
STEPS, ROWS_A_STEP, RANK, ALPHA, RATE = 200, 8, 16, 32, 1e-3
TEXT = f"""`python -m scripts.dev.bench.intents`. {NUM_QUESTIONS} test rows, drawn with a fixed seed, are answered
greedily, before and after {{steps}} steps of {ROWS_A_STEP} training rows, each used at most once. Rank {RANK}, alpha
{ALPHA}, on all linear layers in NF4 with double quantization; AdamW in 32 bits, a peak learning rate of {{rate:g}},
and bf16 as compute dtype. PEFT gets the same rows in the same steps at the same rates, and initial values of its own.
transformers and llama.cpp read the run merged in fp16 onto its dequantized base. The loss is per supervised token."""
# Held-out rows as questions and as examples.
HeldOut = tuple[list[Question], ExampleSet]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model answers to the held-out rows.

    Attributes:
        model: What answered.
        texts: Its answers.
        exact: Share of answers that are the intent's name.
        loss: Its loss on them, in nats per supervised token; None if it was not measured.
    """

    model: str
    texts: list[str]
    exact: float
    loss: float | None = None


def conversations(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Return texts with their intents as conversations."""
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": row["label"]},
            ]
        }
        for row in rows
    ]


def make_config(arguments: argparse.Namespace, folder: Path) -> Any:
    """Write the rows, and return the config of the run."""
    held_out = random.Random(0).sample(banking77("test"), NUM_QUESTIONS)
    files = {
        "train": write(folder / "train.jsonl", conversations(banking77("train"))),
        "eval": write(folder / "test.jsonl", conversations(held_out)),
    }
    return qlora.load_config(
        {
            "model": {"base": str(arguments.model), "compute_dtype": "bfloat16"},
            "lora": {"rank": RANK, "alpha": ALPHA},
            "data": files | {"cache_dir": str(folder / "cache"), "max_seq_len": 128, "packing": False},
            "train": {
                "output_dir": str(folder / "run"),
                "max_steps": arguments.steps,
                "micro_batch_size": ROWS_A_STEP,
                "gradient_accumulation_steps": 1,
                "learning_rate": arguments.rate,
                "optimizer": "adamw_32bit",
                "eval_every": None,
                "save_every": None,
                "log_every": 20,
            },
        }
    )


def ask(name: str, model: Any, tokenizer: Any, held_out: HeldOut) -> Answers:
    """Return the greedy answers of a model, and its loss."""
    questions, examples = held_out
    texts = answer_all(model, tokenizer, [each.prompt for each in questions], MAX_ANSWER, MAX_TOKENS)
    loss = evaluate(model, eval_batches(examples, ROWS_A_STEP)).loss
    return report(Answers(name, texts, exact_match(texts, [each.reference for each in questions]), loss))


def report(answers: Answers) -> Answers:
    """Print figures as soon as they are known."""
    print(f"{answers.model}: {answers.exact:.1%}, loss {answers.loss}", flush=True)
    return answers


def ask_llama_cpp(name: str, file: Path, tokenizer: Any, held_out: HeldOut) -> Answers:
    """Return the greedy answers of a GGUF file in llama.cpp, which is given the same token ids."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=256, n_threads=1, verbose=False)
    questions, texts = held_out[0], []
    for question in questions:
        model.reset()
        ids: list[int] = []
        for token in model.generate(list(question.prompt), temp=0.0, repeat_penalty=1.0):
            if token == model.token_eos() or len(ids) == MAX_ANSWER:
                break
            ids.append(token)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    model.close()
    return report(Answers(name, texts, exact_match(texts, [each.reference for each in questions])))


def train_peft(config: Any, datasets: Any, base: str) -> tuple[Any, Any]:
    """Train PEFT's adapters on bitsandbytes' layers, on the rows of each step of the run."""
    model, tokenizer = build_peft(base, RANK, ALPHA, "none", config.train.seed)
    section = config.train
    plan = BatchPlan(datasets.train.lengths, section.micro_batch_size, 1, None, section.seed)
    steps = resolve_total_steps(section.epochs, section.max_steps, plan.steps_per_epoch)
    warmup = section.warmup_steps if section.warmup_steps is not None else round((section.warmup_ratio or 0) * steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=section.peak, weight_decay=section.weight_decay, betas=section.betas)
    for step in range(steps):
        peft_loss(model, collate([datasets.train[index] for index in plan.window(step)])).backward()
        torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, section.peak, section.lr_scheduler, warmup)
        optimizer.step()
        optimizer.zero_grad()
    return model.base_model.model, tokenizer


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[list[Answers], list[str]]:
    """Train, merge, verify and ask; return the answers, and what verify says."""
    config = make_config(arguments, folder)
    base, tokenizer = qlora.load_base(str(arguments.model), compute_dtype="bfloat16")
    datasets = datasets_from_section(config.data, tokenizer, config.train.seed)
    questions, _ = read_questions(tokenizer, datasets, datasets.eval, NUM_QUESTIONS, config.data.max_seq_len)
    held_out = questions, datasets.eval
    found = [ask("base in NF4", base, tokenizer, held_out)]
    del base
    run = qlora.train(config, show_progress=True).run_dir
    found.append(ask("qlora, the run", *qlora.load_run(run), held_out))
    merged, gguf = folder / "merged", folder / "gguf"
    qlora.merge(run, merged, "float16")
    qlora.merge(run, gguf, "float16", format="gguf")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    found.append(ask("merged in fp16, transformers alone", plain, tokenizer, held_out))
    del plain
    found.append(
        ask(
            "PEFT + bitsandbytes", *train_peft(config, datasets, str(arguments.peft_model or arguments.model)), held_out
        )
    )
    verdicts = [
        f"`verify` of {name}: {'matches' if verified.matches else '; '.join(verified.problems)}"
        for name, verified in (
            ("the merged folder", qlora.verify(run, merged)),
            ("the GGUF file", qlora.verify(run, gguf)),
        )
    ]
    if not arguments.no_llama_cpp:
        (file,) = gguf.glob("*.gguf")
        found.append(ask_llama_cpp("merged into GGUF in fp16, llama.cpp", file, tokenizer, held_out))
    return found, verdicts


def rows_of(found: Sequence[Answers]) -> list[str]:
    """Return the lines of the table."""
    run = found[1]
    lines = ["| model | exact match | answers unlike the run's | held-out loss |", "|---|---|---|---|"]
    for each in found:
        unlike = sum(map(str.__ne__, each.texts, run.texts))
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        lines.append(f"| {each.model} | {each.exact:.1%} | {unlike} of {len(each.texts)} | {loss} |")
    return lines


def main() -> None:
    """Measure, and append the figures to a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="base: a folder or a GGUF file")
    parser.add_argument("--peft-model", type=Path, help="the same base as a folder, if the other is a GGUF file")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--no-llama-cpp", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, verdicts = measure(arguments, Path(folder))
    packages = ("torch", "transformers", "bitsandbytes", "peft", "gguf", "llama-cpp-python")
    text = [
        *heading(f"{arguments.model.stem} on banking77", *packages),
        TEXT.format(steps=arguments.steps, rate=arguments.rate),
        "",
        *rows_of(found),
        "",
        *(f"- {verdict}" for verdict in verdicts),
    ]
    print("\n".join(text))
    append(arguments.out, TITLE, text)


if __name__ == "__main__":
    main()
