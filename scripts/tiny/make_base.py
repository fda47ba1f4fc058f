"""Make the quickstart's tiny base: a tokenizer and a small Llama pretrained on an invented world.

It replaces a download from a model hub. The base learns the world's facts from plain statements, and never sees a
question or the instruction format. On two cores it takes about a minute.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import make_instructions
import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
MAX_TOKENS = 512
RECIPE_FILE = "tiny_recipe.json"


@dataclass(frozen=True)
class Recipe:
    """Settings that determine the base."""

    # Large enough that each creature's name is one token, to which facts can be attached.
    vocab_size: int = 1024
    # Every width is a multiple of 64, NF4's block size.
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 3
    heads: int = 3
    batch_texts: int = 32
    steps: int = 480
    lr: float = 2e-3
    warmup_steps: int = 30
    weight_decay: float = 0.1
    seed: int = 0


def describe_recipe(recipe: Recipe) -> dict[str, object]:
    """Return everything that the base depends on: the settings, and a digest of the code that uses them."""
    sources = sorted(Path(module).resolve() for module in (__file__, world.__file__, make_instructions.__file__))
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return {**asdict(recipe), "code_sha256": code}


def train_tokenizer(vocab_size: int, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts BOS first, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=MAX_TOKENS
    )


def make_tokenizer_texts() -> list[str]:
    """Return texts for the tokenizer: statements and prompts, so that both have few tokens."""
    train_rows, _ = make_instructions.make_rows()
    prompts = [
        f"### Instruction:\n{row['instruction']}\n\n{row['input']}\n\n### Response:\n{row['output']}"
        for row in train_rows
    ]
    return world.make_corpus(rounds=4, seed=0) + prompts


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one batch per step with one text per row: token ids, and labels without the padding."""
    wanted = recipe.steps * recipe.batch_texts
    texts = world.make_corpus(rounds=math.ceil(wanted / world.CREATURES), seed=recipe.seed)[:wanted]
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    for start in range(0, wanted, recipe.batch_texts):
        batch = [torch.tensor(row) for row in rows[start : start + recipe.batch_texts]]
        ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.eos_token_id)
        yield ids, pad_sequence(batch, batch_first=True, padding_value=-100)


def pretrain(model: LlamaForCausalLM, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe) -> None:
    """Train the model on each batch once, with warmup and a cosine decay to zero.

    It uses float32, because bfloat16 gains little at this size and is slow on a CPU without instructions for it.
    """

    def scale_lr(step: int) -> float:
        warmup = min(1.0, (step + 1) / recipe.warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale_lr)
    model.train()
    started = time.monotonic()
    for step, (ids, labels) in enumerate(batches, start=1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.steps:
            print(
                f"step {step}/{recipe.steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )


def train_base(recipe: Recipe) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Train the tokenizer, then the model on the texts that it encodes."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.vocab_size, make_tokenizer_texts())
    model = build_model(recipe, tokenizer)
    pretrain(model, encode_corpus(recipe, tokenizer), recipe)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    return tokenizer, model.to(torch.bfloat16)


def make_base(out: Path, recipe: Recipe) -> None:
    """Make the base in `out`, unless it already holds one of the same recipe.

    The base is written next to `out` and renamed to it, so `out` is never incomplete.

    Raises:
        FileExistsError: `out` holds something else than a base made by this script.
    """
    described = describe_recipe(recipe)
    recipe_path = out / RECIPE_FILE
    if recipe_path.is_file() and json.loads(recipe_path.read_text("utf-8")) == described:
        print(f"{out}: it already holds a base of this recipe")
        return
    if out.exists() and not recipe_path.is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds something other than a tiny base; choose another --out")
    tokenizer, model = train_base(recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        made = Path(staging) / "base"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / RECIPE_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)
    print(f"{out}: made")


def main() -> None:
    """Make the base under --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the base")
    make_base(parser.parse_args().out.resolve(), Recipe())


if __name__ == "__main__":
    main()
