"""Attention with sinks: the formula, gpt-oss' own code, and kernels that compute something else."""

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from qlora.data import collate
from qlora.layers import apply_recompute, use_document_attention
from qlora.layers.sinks import attend_with_sinks, masked_with_sinks, near_mask, sinks_unusable_reason
from qlora.lora import add_lora, lora_layers
from qlora.model import load_base
from tests.layers.test_packed import assert_same, loss_and_gradients, random_documents
from tests.tiny import make_base

HEADS, KV_HEADS, LENGTH, FEATURES = 4, 2, 33, 16
SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "num_hidden_layers": 2}


class Layer(torch.nn.Module):
    """What gpt-oss' own attention function reads of its layer."""

    num_key_value_groups = HEADS // KV_HEADS

    def __init__(self, sinks):
        super().__init__()
        self.sinks = sinks


def random_inputs(generator):
    shapes = [(1, heads, LENGTH, FEATURES) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    sinks, grad_output = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((HEADS,), (1, HEADS, LENGTH, FEATURES))
    )
    return inputs, 2 * sinks, grad_output


@pytest.mark.parametrize("window", [None, 7, 1])
def test_outputs_and_gradients_are_those_of_gpt_oss_own_code(window, generator):
    inputs, sinks, grad_output = random_inputs(generator)
    mask = near_mask(LENGTH, window, torch.device("cpu"))
    added = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    expected = eager_attention_forward(Layer(sinks), *inputs, added, scaling=0.3)[0].transpose(1, 2)
    gradients = torch.autograd.grad(expected, inputs, grad_output)
    for found in (
        attend_with_sinks(*inputs, sinks, 0.3, window),
        masked_with_sinks(*inputs, sinks, 0.3, mask),
        masked_with_sinks(*inputs, sinks, 0.3, added),
    ):
        assert torch.allclose(found, expected, atol=1e-12)
        for one, other in zip(torch.autograd.grad(found, inputs, grad_output), gradients, strict=True):
            assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_is_used_only_if_it_computes_the_formula(dtype):
    device = torch.device("cpu")

    def attend(q, k, v, sinks, window):
        return attend_with_sinks(q, k, v, sinks, None, window)

    def refuse(*_):
        raise RuntimeError("no such operator")

    assert sinks_unusable_reason(attend, device, dtype) is None
    wrong = {
        "differ from": lambda q, k, v, sinks, window: attend(q, k, v, sinks + 1, window),
        "differ from ": lambda q, k, v, sinks, window: attend(q, k, v, sinks, None),
        "differ from  ": lambda q, k, v, sinks, window: attend(q.detach(), k, v, sinks, window) + 0 * q,
        "fails with sinks: no such operator": refuse,
    }
    for words, function in wrong.items():
        assert words.strip() in sinks_unusable_reason(function, device, dtype)


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_gpt_oss_is_trained_by_documents_as_by_its_own_attention(recompute, tmp_path, seed, generator):
    base = make_base(tmp_path / "base", seed, GptOssConfig, sliding_window=5, **SIZES)
    model, _ = load_base(str(base), compute_dtype="float32", quantization="none")
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    documents = random_documents(generator)
    model.train()
    own = loss_and_gradients(model, [collate([document]) for document in documents])
    assert use_document_attention(model) == ("eager by documents (a document at a time)", None)
    apply_recompute(model, recompute)
    for batches in (
        [collate(documents, packed=True)], [collate(documents)], [collate([document]) for document in documents],
    ):  # fmt: skip
        assert_same(*loss_and_gradients(model, batches), *own)
