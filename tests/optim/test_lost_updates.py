"""Fine-tuning at a small learning rate: bf16 factors rounded to nearest lag behind, the others do not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.lora import add_lora, lora_layers
from qlora.nf4 import NF4Linear
from qlora.optim import FlatAdamW, FlatParameters

VOCABULARY, BATCH, LENGTH, STEPS, LEARNING_RATE = 64, 8, 32, 200, 3e-5


def make_text(table, rows, generator):
    """Return text of a Markov chain with transition probabilities (vocabulary, vocabulary)."""
    tokens = torch.empty(rows, LENGTH + 1, dtype=torch.long)
    tokens[:, 0] = torch.randint(VOCABULARY, (rows,), generator=generator)
    for i in range(LENGTH):
        tokens[:, i + 1] = torch.multinomial(table[tokens[:, i]], 1, generator=generator)[:, 0]
    return tokens


def make_table(generator):
    return (2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).softmax(dim=1)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_base(text):
    """Return a Llama trained on `text`, with its linears in NF4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for batch in text.split(BATCH):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, NF4Linear.from_linear(module))
    return model.eval()


def fine_tune(base, text, dtype, rounding):
    model = copy.deepcopy(base)
    # A high alpha, so that the small rate moves the loss within few steps; the factors' updates do not depend on it.
    add_lora(model, rank=8, alpha=128, dtype=dtype)
    flat = FlatParameters(
        (f"{name}.{key}", parameter)
        for name, layer in lora_layers(model)
        for key, parameter in layer.named_parameters(recurse=False)
    )
    optimizer = FlatAdamW(flat, rounding=rounding)
    for batch in text.split(BATCH):
        flat.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step(LEARNING_RATE)
    return model


@pytest.mark.slow
def test_only_rounding_to_nearest_lags_behind_fp32_factors():
    # Fixed seeds: this demonstrates, and its distances are of this model.
    generator = torch.Generator().manual_seed(0)
    old, other = make_table(generator), make_table(generator)
    new = 0.5 * old + 0.5 * other
    base = make_base(make_text(old, 200 * BATCH, generator))
    text, held_out = make_text(new, STEPS * BATCH, generator), make_text(new, 128, generator)
    runs = {
        "fp32": (torch.float32, "nearest"),  # fp32 loses no update.
        "nearest": (torch.bfloat16, "nearest"),
        "stochastic": (torch.bfloat16, "stochastic"),
        "master": (torch.bfloat16, "master"),
    }
    models = {name: fine_tune(base, text, *settings) for name, settings in runs.items()}
    with torch.no_grad():
        start = loss_of(base, held_out).item()
        losses = {name: loss_of(model, held_out).item() for name, model in models.items()}
    print(f"start {start:.4f}", *[f"{name} {loss:.4f}" for name, loss in losses.items()])

    gaps = {name: loss - losses["fp32"] for name, loss in losses.items()}
    assert losses["fp32"] < start - 0.05
    assert abs(gaps["stochastic"]) < 0.005
    assert abs(gaps["master"]) < 0.005
    assert gaps["nearest"] > 0.01
