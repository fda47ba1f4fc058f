"""Rotary embeddings: the bits of transformers' function, values and gradients, in plain torch and by the kernel."""

from functools import partial

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora.kernels import rotate
from tests.interpreted import interpret


def own(query, key, cos, sin):
    """Rotate as Llama does, which has the heads before the tokens."""
    rotated = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return tuple(each.transpose(1, 2) for each in rotated)


def with_gradients(function, query, key, grads):
    inputs = [each.clone().requires_grad_() for each in (query, key)]
    outputs = function(*inputs)
    return *outputs, *torch.autograd.grad(outputs, inputs, grads)


# Not bf16 for the kernel, whose bit patterns the interpreter rounds differently.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", torch.bfloat16),
        *((name, each) for name in ("plain", "kernel") for each in (torch.float16, torch.float32)),
    ],
)
@pytest.mark.parametrize(("batch", "rows_of_angles"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("width", [16, 40])
def test_values_and_gradients_are_those_of_transformers_bit_for_bit(
    name, dtype, batch, rows_of_angles, width, generator, monkeypatch
):
    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    interpret(monkeypatch, "rotary_triton")
    query, key = draw(batch, 70, 4, width), draw(batch, 70, 2, width)
    # Of two independent halves, so that one in place of the other shows.
    cos, sin = draw(rows_of_angles, 70, width), draw(rows_of_angles, 70, width)
    grads = draw(*query.shape), draw(*key.shape)
    wanted = with_gradients(partial(own, cos=cos, sin=sin), query, key, grads)
    function = partial(rotate, cos=cos, sin=sin, fused=name == "kernel")
    found = with_gradients(function, query, key, grads)
    assert all(map(torch.equal, found, wanted))


def test_the_gradient_turns_back(generator):
    query, key = (torch.randn(1, 5, heads, 8, generator=generator) for heads in (2, 1))
    angles = torch.randn(1, 5, 4, generator=generator).repeat(1, 1, 2)
    by_angles = partial(rotate, cos=angles.cos(), sin=angles.sin())
    *rotated, back, back_key = with_gradients(by_angles, query, key, by_angles(query, key))
    assert torch.allclose(back, query, atol=1e-6)
    assert torch.allclose(back_key, key, atol=1e-6)
    assert not torch.allclose(rotated[0], query, atol=0.1)


@pytest.mark.parametrize("narrow", ["cos", "sin"])
def test_angles_of_a_part_of_the_features_are_refused(narrow):
    tensors = {"query": torch.ones(1, 5, 2, 16), "key": torch.ones(1, 5, 1, 16)}
    tensors |= {name: torch.ones(1, 5, 8 if name == narrow else 16) for name in ("cos", "sin")}
    with pytest.raises(ValueError, match="rotations of a part of the features are not supported"):
        rotate(**tensors)
