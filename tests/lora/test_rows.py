"""Rows of embedding and head trained in full: loss, logits and gradients equal those of a plain model in fp32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma3TextConfig, LlamaConfig, PhiConfig, Qwen3Config

from qlora.data import collate, make_example
from qlora.errors import ModelError
from qlora.layers import rebuild_activations
from qlora.lora import EmbeddingRows, TrainedEmbedding, add_lora, lora_layers, train_rows, trained_rows
from qlora.model import check_loss, supervised_loss
from qlora.optim import FlatParameters
from tests.tiny import SIZES

ROWS, PADDING = SIZES["vocab_size"], 5
BEHIND, SPARE = range(ROWS, ROWS + 4), range(ROWS - 9, ROWS - 4)
BOTH = ["embed_tokens", "lm_head"]
CASES = {
    "both in full": (LlamaConfig, False, BOTH, range(0), {}),
    "the embedding in full": (LlamaConfig, False, ["model.embed_tokens"], range(0), {}),
    "the head in full, beside new rows": (LlamaConfig, False, ["lm_head"], BEHIND, {}),
    "new rows": (LlamaConfig, False, [], BEHIND, {}),
    "new rows among spare ones": (LlamaConfig, False, [], SPARE, {}),
    "new rows, some spare": (LlamaConfig, False, [], range(ROWS - 2, ROWS + 2), {}),
    "tied, in full": (LlamaConfig, True, ["lm_head"], range(0), {}),
    "tied, new rows in full": (Qwen3Config, True, ["embed_tokens"], BEHIND, {}),
    "tied, new rows": (Qwen3Config, True, [], SPARE, {}),
    "an embedding that scales": (Gemma3TextConfig, True, BOTH, BEHIND, {}),
    "new rows, scaled and capped": (Gemma3TextConfig, True, [], BEHIND, {"final_logit_softcapping": 3.0}),
    "a scale on the logits": (CohereConfig, True, [], BEHIND, {"logit_scale": 0.5}),
    "a head with biases": (PhiConfig, False, ["lm_head"], SPARE, {"partial_rotary_factor": 0.5}),
}


def make_model(seed, config_class=LlamaConfig, tied=False, **settings):
    torch.manual_seed(seed)
    sizes = {**SIZES, "tie_word_embeddings": tied, "pad_token_id": PADDING, **settings}
    model = AutoModelForCausalLM.from_config(config_class(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def adapted(model, modules, new_ids, dtype=torch.float32):
    add_lora(model, rank=4, dtype=dtype)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return train_rows(model, modules, new_ids, dtype)


def plain_twin(model, tuned, new_ids):
    """Return a plain model of the same weights, its embeddings resized by transformers, with the updates added."""
    if new_ids.stop > ROWS:
        model.resize_token_embeddings(new_ids.stop, mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[new_ids.start : new_ids.stop] = weight[: new_ids.start].mean(0) if new_ids else 0
        for name, layer in lora_layers(tuned):
            model.get_submodule(name).weight += layer.delta_weight()
    return model


def random_batch(generator, new_ids, length=40):
    ids = torch.randint(ROWS - 9, (length,), generator=generator).tolist() + [PADDING] * 3 + 2 * list(new_ids)
    return collate([make_example(ids, [True] * len(ids))])


@pytest.mark.parametrize("case", CASES)
def test_everything_is_as_in_a_plain_model(case, seed, generator):
    config_class, tied, modules, new_ids, settings = CASES[case]
    base = make_model(seed, config_class, tied, **settings)
    tuned = copy.deepcopy(base)
    spans = adapted(tuned, modules, new_ids)
    plain, batch = plain_twin(base, tuned, new_ids), random_batch(generator, new_ids)
    rebuild_activations(tuned)
    check_loss(tuned, batch)
    tuned.train()
    loss = supervised_loss(tuned, batch)
    loss.backward()
    logits = plain(input_ids=batch.input_ids).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval()(input_ids=batch.input_ids).logits, logits, rtol=1e-4, atol=1e-4)
    trained = dict(trained_rows(tuned))
    assert {name: rows.ids for name, rows in trained.items()} == spans
    assert len(spans) == (2 if tied or new_ids else len(modules))
    for name, rows in trained.items():
        grad = plain.get_submodule(name).weight.grad[rows.ids.start : rows.ids.stop]
        assert (rows.weight.grad - grad).norm() < 5e-5 * grad.norm()
    names = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".rows." in name for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_before_a_step_the_model_is_its_base_bit_for_bit(tied, seed, generator):
    model = make_model(seed, tied=tied).to(torch.bfloat16).eval()
    ids = random_batch(generator, range(0)).input_ids
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        train_rows(model, BOTH)
        assert torch.equal(model.eval()(input_ids=ids).logits, expected)


def test_new_rows_begin_as_the_mean_and_the_base_stays(seed):
    model = make_model(seed)
    embedding, head = (part.weight.clone() for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    train_rows(model, [], SPARE, torch.float32)
    for (name, rows), weight in zip(trained_rows(model), (embedding, head), strict=True):
        expected = weight[: SPARE.start].double().mean(0).float().expand(len(SPARE), -1)
        torch.testing.assert_close(rows.weight, expected)
        assert torch.equal(model.get_submodule(name).base.weight, weight)


def test_new_rows_are_a_part_of_an_embedding_trained_in_full(seed):
    model = make_model(seed)
    weight = model.get_input_embeddings().weight.clone()
    assert train_rows(model, ["embed_tokens"], BEHIND, torch.float32)["model.embed_tokens"] == range(BEHIND.stop)
    layer = model.get_input_embeddings()
    assert torch.equal(layer.rows.weight[:ROWS], weight)
    torch.testing.assert_close(layer.rows.weight[ROWS:], weight.mean(0).expand(4, -1))
    assert layer.num_embeddings == BEHIND.stop
    assert not layer.base.weight.numel()  # nothing reads it any more


def test_a_frequent_tokens_gradient_is_summed_in_fp32(generator):
    """In bf16, each small gradient would be lost in the sum of those before."""
    rows = EmbeddingRows(torch.zeros(8, 4).bfloat16(), range(8), 8)
    layer = TrainedEmbedding(nn.Embedding(8, 4).bfloat16(), rows)
    flat = FlatParameters([("rows", rows.weight)])
    grad = (torch.rand(5000, 4, generator=generator) + 0.5).bfloat16()
    layer(torch.full((5000,), 3)).backward(grad)
    torch.testing.assert_close(rows.weight.grad[3], grad.double().sum(0).float(), rtol=1e-4, atol=0)
    assert flat.grad.count_nonzero() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_another_dtype_are_computed_with_in_the_models(dtype, seed, generator):
    model = make_model(seed).to(dtype)
    adapted(model, ["embed_tokens"], BEHIND, torch.bfloat16)
    assert model.dtype == dtype
    batch = random_batch(generator, BEHIND)
    (supervised_loss(model.train(), batch) * 1024).backward()
    weights = {name: rows.weight for name, rows in trained_rows(model)}
    assert model.get_input_embeddings()(batch.input_ids).dtype == dtype
    assert all(weight.dtype == torch.bfloat16 and weight.grad.isfinite().all() for weight in weights.values())
    assert weights["lm_head"].grad.any(1).all()


@pytest.mark.parametrize("name", ["norm", "q_proj", "model.layers.0.mlp.up_proj", "embed", "head"])
def test_anything_else_is_refused_by_its_name(name, seed):
    with pytest.raises(ModelError, match=rf"lora.modules_to_save: '{name}' .*model.embed_tokens and lm_head"):
        train_rows(make_model(seed), ["lm_head", name])


def test_tokens_that_have_no_rows_already_are_reported(seed):
    with pytest.raises(ModelError, match=f"first id is {ROWS + 1}, but model.embed_tokens has {ROWS} rows"):
        train_rows(make_model(seed), [], range(ROWS + 1, ROWS + 2))


def test_a_head_with_biases_is_not_made_longer(seed):
    with pytest.raises(ModelError, match="each with a bias"):
        train_rows(make_model(seed, PhiConfig, partial_rotary_factor=0.5), [], BEHIND)
