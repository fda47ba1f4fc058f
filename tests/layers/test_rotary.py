"""Rotary embeddings that depend on the length: a document's states are those that it has alone in a new model."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config

from qlora.data import collate, make_example
from qlora.layers.rotary import document_lengths, use_document_rotary
from qlora.lora import text_model
from qlora.model.loss import model_inputs
from tests.tiny import SIZES

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "dynamic": (LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "dynamic, by layer": (
        Gemma3TextConfig,
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}},
            "max_position_embeddings": 16,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "longrope": (Phi3Config, {"rope_parameters": LONGROPE, "max_position_embeddings": 64, "pad_token_id": 0}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_document_does_not_depend_on_those_beside_and_before_it(kind, packed, seed, generator):
    config_class, sizes = CONFIGS[kind]
    torch.manual_seed(seed)
    config = config_class(**{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    documents = [torch.randint(256, (length,), generator=generator).tolist() for length in (40, 12, 25)]
    alone = [copy.deepcopy(model).model(torch.tensor([ids])).last_hidden_state[0] for ids in documents]
    use_document_rotary(model)
    examples = [make_example(ids, [True] * len(ids)) for ids in documents]
    for order in ([0, 1, 2], [2, 1]):
        batch = collate([examples[index] for index in order], packed=packed)
        states = text_model(model)(**model_inputs(model, batch)).last_hidden_state
        lengths = [len(documents[index]) for index in order]
        rows = states[0].split(lengths) if packed else [row[:n] for row, n in zip(states, lengths, strict=True)]
        for index, row in zip(order, rows, strict=True):
            torch.testing.assert_close(row, alone[index], rtol=0, atol=1e-5)


def test_documents_are_found_by_their_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [3, 4, 5, 6, 7]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 2, 2], [2, 2, 1, 1, 1], [8] * 5]
