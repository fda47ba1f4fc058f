"""Recomputation: the same gradients bit for bit, from fewer saved bytes."""

import pytest
import torch
from torch import nn

from qlora.data import collate
from qlora.data.tokens import make_example
from qlora.errors import ModelError
from qlora.lora import add_lora, lora_layers
from qlora.model import apply_recompute, load_base, supervised_loss
from tests.reference.held import saved_tensors


def make_model(base, dropout, generator, compute_dtype="bfloat16"):
    model, _ = load_base(str(base), compute_dtype=compute_dtype)
    add_lora(model, rank=4, dropout=dropout)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.05, generator=generator)
    return model.train()


def random_batch(generator, length=40):
    ids = torch.randint(256, (2, length), generator=generator).numpy()
    return collate([make_example(row, [True] * length) for row in ids])


def gradients(model, batch, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = supervised_loss(model, batch)
    loss.backward()
    return loss, {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_without_it_bit_for_bit(dropout, compute_dtype, tiny_base, generator, seed):
    model, batch = make_model(tiny_base, dropout, generator, compute_dtype), random_batch(generator)
    assert apply_recompute(model, "none") == "none"
    loss, expected = gradients(model, batch, seed)
    assert apply_recompute(model, "full") == "full"
    loss_again, found = gradients(model, batch, seed)
    assert loss.item() == loss_again.item()
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        assert torch.equal(found[name], grad), name


def test_fewer_bytes_are_held_for_the_backward(tiny_base, generator):
    model, batch = make_model(tiny_base, 0.0, generator), random_batch(generator)
    held = {}
    for level in ("none", "full"):
        apply_recompute(model, level)
        _, tensors = saved_tensors(lambda: supervised_loss(model, batch))
        parameters = {value.data_ptr() for value in model.parameters()}
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
        held[level] = sum(size for pointer, size in storages.items() if pointer not in parameters)
    assert held["full"] < held["none"] / 3


def test_the_first_layers_input_asks_for_no_gradient(tiny_base, generator):
    """Re-entrant checkpointing would need one from the frozen embeddings."""
    model, batch = make_model(tiny_base, 0.0, generator), random_batch(generator)
    apply_recompute(model, "full")
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda *arguments: seen.append(arguments[2].requires_grad))
    loss = supervised_loss(model, batch)
    assert seen == [False]
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes.extend(parent for parent, _ in node.next_functions)
    assert names
    assert not any("CheckpointFunction" in node.name() for node in names)


def test_auto_is_full_where_layers_can_be_recomputed(tiny_base):
    model, _ = load_base(str(tiny_base))
    assert apply_recompute(model, "auto") == "full"
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_model_whose_layers_can_not_be_recomputed_is_told():
    model = nn.Sequential(nn.Linear(2, 2))
    assert apply_recompute(model, "auto") == "none"
    assert apply_recompute(model, "none") == "none"
    with pytest.raises(ModelError, match=r"model\.recompute=none"):
        apply_recompute(model, "full")
