"""Documents packed into one sequence: the same loss and gradients as separately, or a reason against it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    BloomConfig,
    CohereConfig,
    CpmAntConfig,
    CTRLConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from qlora.data import collate, make_example
from qlora.errors import ModelError
from qlora.layers import apply_recompute, use_document_attention
from qlora.lora import add_lora, lora_layers
from qlora.model import load_base, mixed_reason, supervised_loss
from qlora.model.isolation import check_causal
from tests.combinations import pairs
from tests.tiny import make_base

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
FALCON = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
# Windows are shorter than the documents, so that they begin and end within them.
KEEPS_APART = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma": (GemmaConfig, {}),
    "gemma2 with a window": (Gemma2Config, {"sliding_window": 5}),
    "gemma3 with a window": (Gemma3TextConfig, {"sliding_window": 5}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral with a window": (MistralConfig, {"sliding_window": 5}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "phi3": (Phi3Config, {}),
    "cohere": (CohereConfig, {}),
    "granite": (GraniteConfig, {}),
    "gpt2": (GPT2Config, GPT2),
}
NOT_BY_DOCUMENTS = ("gemma2 with a window", "gpt2")  # one caps its scores, the other drops some
MIXES = {
    "opt, whose positions a mask tells": (OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom, which has none": (BloomConfig, {"n_layer": 2, "n_head": 4}),
    "mamba, a state": (MambaConfig, {"state_size": 8}),
    "recurrent gemma, a state and attention": (
        RecurrentGemmaConfig,
        {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8},
    ),
    "falcon h1, both in every layer": (FalconH1Config, FALCON),
}


def families(choice):
    return pytest.mark.parametrize(("config_class", "sizes"), choice.values(), ids=choice)


def random_documents(generator, lengths=(17, 2, 9, 23)):
    """Return documents with different supervised shares and different weights."""
    documents = []
    for length in lengths:
        weights = torch.randint(3, (length,), generator=generator) / 2
        weights[-1] = 1
        documents.append(make_example(torch.randint(256, (length,), generator=generator).numpy(), weights.numpy()))
    return documents


def load(folder, seed, config_class, sizes, attention="auto", compute_dtype="float32", **settings):
    if attention == "sdpa" and config_class is Gemma2Config:
        pytest.skip("Gemma 2 has no sdpa attention")
    base = make_base(folder / "base", seed, config_class, **sizes)
    arguments = {"attention": attention, "allow_unquantized": True, **settings}
    return load_base(str(base), compute_dtype=compute_dtype, **arguments)[0]


def loss_and_gradients(model, batches):
    model.zero_grad()
    loss = sum(supervised_loss(model, batch) for batch in batches)
    loss.backward()
    layers = [parameter for _, layer in lora_layers(model) for parameter in (layer.lora_A, layer.lora_B)]
    return loss.item(), [parameter.grad.clone() for parameter in layers]


@pytest.mark.parametrize(
    ("family", "attention", "recompute"), pairs(tuple(KEEPS_APART), ("sdpa", "eager"), ("none", "full"))
)
def test_a_packed_sequence_trains_what_its_documents_do_separately(
    family, attention, recompute, tmp_path, seed, generator
):
    config_class, sizes = KEEPS_APART[family]
    model = load(tmp_path, seed, config_class, sizes, attention)
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    apply_recompute(model, recompute)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2 has some
    documents = random_documents(generator)
    packed_loss, packed = loss_and_gradients(model, [collate(documents, packed=True)])
    loss, separate = loss_and_gradients(model, [collate([document]) for document in documents])
    assert_same(packed_loss, packed, loss, separate)


def assert_same(packed_loss, packed, loss, separate):
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for found, expected in zip(packed, separate, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).norm() < 1e-4 * expected.norm()


@families({name: family for name, family in KEEPS_APART.items() if name not in NOT_BY_DOCUMENTS})
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_attention_by_documents_trains_what_they_do_separately(
    config_class, sizes, recompute, tmp_path, seed, generator
):
    model = load(tmp_path, seed, config_class, sizes)
    add_lora(model, rank=4, dtype=torch.float32)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    apply_recompute(model, recompute)
    model.train()
    documents = random_documents(generator)
    loss, separate = loss_and_gradients(model, [collate([document]) for document in documents])
    assert "by documents" in use_document_attention(model)[0]
    assert_same(*loss_and_gradients(model, [collate(documents, packed=True)]), loss, separate)
    assert_same(*loss_and_gradients(model, [collate([document]) for document in documents]), loss, separate)
    assert_same(*loss_and_gradients(model, [collate(documents)]), loss, separate)
    assert mixed_reason(model, *documents[-2:]) is None


def test_attention_by_documents_separates_what_a_mask_would_not(tmp_path, seed, generator):
    """OPT's own mask is made from padding alone, regardless of positions."""
    model = load(tmp_path, seed, *MIXES["opt, whose positions a mask tells"])
    documents = random_documents(generator)
    with torch.no_grad():
        separate = sum(supervised_loss(model, collate([document])).item() for document in documents)
        use_document_attention(model)
        packed = supervised_loss(model, collate(documents, packed=True)).item()
    assert packed == pytest.approx(separate, rel=1e-5)
    assert mixed_reason(model, *documents[-2:]) is None


@families({name: KEEPS_APART[name] for name in ("gemma2 with a window", "gpt2")})
def test_an_architecture_whose_attention_is_another_keeps_its_own(config_class, sizes, tmp_path, seed):
    model = load(tmp_path, seed, config_class, sizes)
    before = model.config._attn_implementation
    attention, why = use_document_attention(model)
    assert attention == f"{before}, with a mask over all documents of a row"
    assert why.startswith(("the architecture ", "model.attention "))
    assert model.config._attn_implementation == before


def test_attention_by_documents_makes_no_tensor_of_all_tokens_squared(tiny_base, generator):
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    use_document_attention(model)
    batch = collate(random_documents(generator, lengths=(20, 30, 25, 35)), packed=True)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            result = function(*arguments, **(kwargs or {}))
            sizes.extend(one.shape for one in tree_leaves(result) if isinstance(one, torch.Tensor))
            return result

    with Sizes(), torch.no_grad():
        supervised_loss(model, batch)
    assert sizes
    assert not [shape for shape in sizes if list(shape).count(110) > 1]


@families(KEEPS_APART)
def test_a_padded_batch_trains_what_its_documents_do_separately(config_class, sizes, tmp_path, seed, generator):
    model = load(tmp_path, seed, config_class, sizes)
    documents = random_documents(generator)
    with torch.no_grad():
        together = supervised_loss(model, collate(documents)).item()
        separate = sum(supervised_loss(model, collate([document])).item() for document in documents)
    assert together == pytest.approx(separate, rel=1e-5)


def test_weights_count_in_the_loss_of_a_batch(tiny_base, generator):
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    documents = random_documents(generator)
    batch = collate(documents, packed=True)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        log_probabilities = logits.log_softmax(-1)
        found = supervised_loss(model, batch).item()
    expected, begin = 0.0, 0
    for document in documents:
        for place in range(1, len(document)):
            log_probability = log_probabilities[0, begin + place - 1, int(document.input_ids[place])]
            expected -= float(document.weights[place]) * log_probability.item()
        begin += len(document)
    assert found == pytest.approx(expected, rel=1e-5)


# A small range leaves a random model's layers almost without effect, and so makes a leak a weak one.
RANGES = (0.02, 0.1)
DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize(("family", "compute_dtype", "initializer_range"), pairs(tuple(KEEPS_APART), DTYPES, RANGES))
def test_the_check_passes_if_documents_are_separate(
    family, compute_dtype, initializer_range, tmp_path, seed, generator
):
    config_class, sizes = KEEPS_APART[family]
    if config_class is MixtralConfig and compute_dtype == "bfloat16":
        pytest.skip("its experts' sizes are too small for a product in bf16")
    sizes = sizes | {"initializer_range": initializer_range}
    model = load(tmp_path, seed, config_class, sizes, compute_dtype=compute_dtype)
    add_lora(model, rank=4)
    for count in (16, 2):
        assert mixed_reason(model, *random_documents(generator, (count, count))) is None
    assert not model.training


@pytest.mark.parametrize(("family", "compute_dtype", "initializer_range"), pairs(tuple(MIXES), DTYPES, RANGES))
def test_a_model_that_mixes_documents_is_found(family, compute_dtype, initializer_range, tmp_path, seed, generator):
    config_class, sizes = MIXES[family]
    if config_class is MambaConfig and compute_dtype == "bfloat16":
        pytest.skip("its plain implementation runs in fp32 alone")
    sizes = sizes | {"initializer_range": initializer_range}
    model = load(tmp_path, seed, config_class, sizes, compute_dtype=compute_dtype, quantization="none")
    reason = mixed_reason(model, *random_documents(generator, (16, 16)))
    assert reason.startswith(f"{type(model).__name__} lets documents packed into one sequence change each other")


def test_a_mixture_that_the_model_hides_in_one_layer_is_found(tiny_base, generator):
    """Every token gets 1/10,000 of the first token's state: too little to show in a loss."""
    model, _ = load_base(str(tiny_base), compute_dtype="float32")
    documents = random_documents(generator, (16, 16))
    assert mixed_reason(model, *documents) is None
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(lambda _module, _inputs, output: output + 1e-4 * output[:, :1])
    assert mixed_reason(model, *documents) is not None
    handle.remove()
    assert mixed_reason(model, *documents) is None
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path, seed, generator):
    (document,) = random_documents(generator, (16,))
    check_causal(load(tmp_path / "causal", seed, LlamaConfig, {}), document)
    config = BertGenerationConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    sees_all = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ModelError, match=r"lets tokens see later ones .* decoder-only model"):
        check_causal(sees_all, document)


def test_a_model_that_embeds_tokens_of_its_own_is_refused(seed, generator):
    """Its gradients can't be told apart by tokens of the document."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "dim_head": 32, "dim_ff": 64, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(CpmAntConfig(vocab_size=259, prompt_length=5, **sizes))
    with pytest.raises(ModelError, match="CpmAntForCausalLM embeds 21 tokens for a document of 16"):
        check_causal(model, *random_documents(generator, (16,)))


def test_a_model_that_scales_its_embeddings_in_place_is_tried(tmp_path, seed, generator):
    sizes = {"n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
    model = load(tmp_path, seed, CTRLConfig, sizes)
    assert mixed_reason(model, *random_documents(generator, (16, 16))) is None
